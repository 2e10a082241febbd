"""What the network needs from above: Protocols that ``fabric/app/node.py`` fills."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
import trio

from fabric.core.ids import PeerId


class Decision(msgspec.Struct, frozen=True):
    """An answer with its reason; a refusal says what the refused can do next."""

    allowed: bool
    code: str = ""
    reason: str = ""
    next_step: str = ""


ALLOWED = Decision(allowed=True)


class Gate(Protocol):
    """Who may open what. Default deny, synchronous, answered from memory.

    Asked by RPC, data plane and streams at open. When a decision changes, the node
    closes that peer's live connections.
    """

    def allows(self, peer: PeerId, protocol: str) -> Decision:
        """Return whether ``peer`` may open ``protocol`` (a protocol id, see below)."""
        ...


PROTOCOL_OFFER = "/fabric/data/1"
"""Control stream that offers a data-plane connection; admitted members only."""
PROTOCOL_RPC = "/fabric/rpc/1"
"""The multiplexed RPC connection; admitted members only."""
PROTOCOL_ATTEST = "/fabric/attest/1"
"""Admission. Open to everyone: this is how a peer becomes admitted."""


class Broadcast(Protocol):
    """Best-effort publish to every member of a topic (gossipsub, or memory).

    Lossy, unordered, may duplicate: whatever must arrive is repaired by reconciliation.
    """

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send ``payload`` (at most 64 KiB) to the members of ``topic``."""
        ...

    def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """Return a bounded channel of (forwarder, payload); overflow is dropped."""
        ...


PathKind = Literal["direct", "punched", "relay"]
ALL_PATHS: tuple[PathKind, ...] = ("direct", "punched", "relay")
BETTER_THAN_RELAY: frozenset[PathKind] = frozenset({"direct", "punched"})


class PathProvider(Protocol):
    """Data-plane sockets where a plain dial does not lead: implemented by ``nat``.

    The other side's provider hands its end to ``DataPlane.accept_socket``; what the
    socket is for is said by the label that follows, as on a plain connection.
    """

    def rank(self, peer: PeerId, addresses: Sequence[str]) -> tuple[str, ...]:
        """Return those of ``peer``'s "ip:port" worth a dial from here, best first.

        Private addresses of another site are not: somebody else may answer there.
        """
        ...

    async def punch(self, peer: PeerId) -> socket.socket:
        """Return a connected, non-blocking TCP socket through both sides' NATs.

        Raises:
            NoRoute: the NATs do not allow it, or not now; the reason says which.
        """
        ...

    def claim(self, label: bytes, sock: socket.socket) -> bool:
        """Take an inbound ``sock`` whose first 16 bytes are the nonce of a punch.

        A peer whose NAT cannot be punched dials our public listener instead. Returns
        whether it is one; only then ``sock`` is taken.
        """
        ...

    async def circuit(self, peer: PeerId) -> socket.socket:
        """Return one end of a socket pair whose bytes a relay carries to ``peer``.

        Raises:
            NoRoute: no relay reaches ``peer``; the reason lists what each said.
        """
        ...


class LinkMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """One link as its one end measured it.

    Attributes:
        rtt_seconds: Smoothed round-trip time.
        up_bytes_per_second: Achievable from us to the peer; 0 when not measured.
        down_bytes_per_second: Achievable from the peer to us; 0 when not measured.
        measured_at: Monotonic seconds of the bandwidth measurement.
        path: "direct", "punched" or "relay" at that time.
    """

    rtt_seconds: float
    up_bytes_per_second: float = 0.0
    down_bytes_per_second: float = 0.0
    measured_at: float = 0.0
    path: PathKind = "direct"


class LinkProbe(Protocol):
    """Measured links, cheap and cached: implemented by ``nat``."""

    def link(self, peer: PeerId) -> LinkMeasurement | None:
        """Return the last measurement of the link with ``peer``, or None."""
        ...

    async def measure(self, peer: PeerId) -> LinkMeasurement:
        """Return a measurement no older than the configured age; probes if need be.

        Raises:
            Unavailable: the peer cannot be reached.
        """
        ...
