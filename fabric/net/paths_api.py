"""Paths as their users see them; ``paths.py`` is the implementation."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import msgspec

from fabric.core.ids import PeerId
from fabric.net.ports import ALL_PATHS, PathKind


class Purpose(msgspec.Struct, frozen=True):
    """Why a data-plane connection is opened: the accepting side routes by it.

    A worker's connection names its job; the daemon that accepts hands the socket to the
    worker that registered ``(job, counter)`` with :meth:`Paths.expect`.
    """

    job: str
    counter: int
    """Generation counter (fencing epoch) the connection belongs to."""
    channel: str = "exchange"
    """Free name inside the job: "exchange", "activations", "tokens"."""


@dataclass(frozen=True)
class WorkerSocket:
    """A connected socket for a worker, before its TLS handshake.

    Attributes:
        sock: Blocking, connected; the receiver owns and closes it.
        peer: The daemon identity at the other end.
        peer_certificate: DER job certificate of the other worker: the one certificate
            to trust in the handshake; empty when no TLS is wanted (same daemon).
        initiator: Whether we dialled (TLS client) or accepted (TLS server).
        purpose: What the connection is for.
        path: "local", "direct", "punched" or "relay".
    """

    sock: socket.socket
    peer: PeerId
    peer_certificate: bytes
    initiator: bool
    purpose: Purpose
    path: str


class Paths(Protocol):
    """Opens data-plane sockets for workers, which do not know which path they got."""

    async def open(
        self,
        peer: PeerId,
        purpose: Purpose,
        certificate: bytes,
        kinds: Collection[PathKind] = ALL_PATHS,
    ) -> WorkerSocket:
        """Return a connected socket to ``peer``'s worker of ``purpose.job``.

        Args:
            peer: The other daemon; our own id gives a socketpair.
            purpose: Names job, generation and channel.
            certificate: DER job certificate of our worker, shown in the offer.
            kinds: The kinds of path that are wanted; who got a relayed socket asks
                later for BETTER_THAN_RELAY.

        Raises:
            Unavailable: no path, or the other side has no such worker (yet).
            RemoteRefused: the other side's gate or job refuses us.
        """
        ...

    def expect(
        self, job: str, certificate: bytes, peers: frozenset[PeerId]
    ) -> WorkerSockets:
        """Accept connections for ``job`` from ``peers`` until the result is closed.

        Args:
            job: The job.
            certificate: DER job certificate of our worker, shown in every answer.
            peers: Who may connect; replace with :meth:`WorkerSockets.allow`.
        """
        ...

    def kind(self, peer: PeerId) -> str | None:
        """Return the path kind in use with ``peer``, or None."""
        ...


class WorkerSockets(Protocol):
    """Inbound sockets of one job's worker."""

    async def accept(self) -> WorkerSocket:
        """Return the next inbound socket; waits for ever, so bound it."""
        ...

    def allow(self, peers: frozenset[PeerId], *, min_counter: int) -> None:
        """Accept from ``peers`` only, for generations of at least ``min_counter``."""
        ...

    def renew(self, certificate: bytes) -> None:
        """Show ``certificate`` from now on."""
        ...

    def close(self) -> None:
        """Refuse further connections and close those not yet accepted."""
        ...


class BulkSocket(Protocol):
    """A blocking, authenticated TLS socket of two daemons: one thread at a time."""

    def sendall(self, data: bytes | bytearray | memoryview, /) -> None:
        """Send all of ``data``; raises OSError when the peer is gone or stalls."""
        ...

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0, /) -> int:
        """Receive into ``buffer``; 0 at the end of the stream."""
        ...

    def close(self) -> None:
        """Close the socket."""
        ...


BulkHandler = Callable[[BulkSocket, PeerId], None]
"""Serves one inbound bulk connection in a thread of its own; may block."""


class BulkPaths(Protocol):
    """Bulk connections between daemons, under their identity certificates."""

    async def dial_bulk(self, peer: PeerId, service: str) -> BulkSocket:
        """Return a connected, authenticated socket to ``peer``'s ``service``.

        Raises:
            Unavailable: no path, or the peer does not serve it.
            RemoteRefused: the peer's gate refuses us.
        """
        ...

    def serve_bulk(self, service: str, handler: BulkHandler) -> None:
        """Run ``handler`` in a thread for each inbound connection to ``service``.

        At most ``config.max_bulk_connections`` at once; more are refused.
        """
        ...
