"""What was last tried towards each peer, for ``fabric why`` and the doctor. Pure.

The parts that dial circuits and punch holes tell it how that went, good or bad; nothing
is decided by it. It holds the peers that were tried last, and of each the relays tried
last, so that nobody can make it grow.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from nat.punch.facts import Address, NatFacts

MAX_PEERS = 256
"""Peers remembered; a person asks about one of the last few."""
MAX_RELAYS = 8
"""Relays remembered per peer; a peer announces two."""
MAX_ENDPOINTS = 8
"""Endpoints of a punch that are named."""

Plane = Literal["control", "data"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended; the fields of a FabricError, all empty when it worked.

    Attributes:
        at: Monotonic seconds of its end.
        seconds: What it took.
    """

    at: float
    seconds: float
    code: str = ""
    reason: str = ""
    next_step: str = ""

    @property
    def worked(self) -> bool:
        """Whether it came to a connection."""
        return not self.code


def outcome(began: float, now: float, error: FabricError | None = None) -> Outcome:
    """Return how an attempt ended that began at ``began`` and ends now."""
    if error is None:
        return Outcome(at=now, seconds=now - began)
    return Outcome(
        at=now,
        seconds=now - began,
        code=error.code,
        reason=error.reason,
        next_step=error.next_step,
    )


@dataclass
class PunchNotes:
    """What one punch learns on its way; filled in by whoever plays it.

    Attributes:
        endpoints: What was dialled from the punched port.
        tries: Dials in all.
        peer: What the other side said of its NAT.
        error: Why the other side got no socket from us, where that is not raised.
        agreed_at: When the first SYNC was sent, on the clock of outcomes; None before.
    """

    endpoints: tuple[Address, ...] = ()
    tries: int = 0
    peer: NatFacts | None = None
    error: FabricError | None = None
    agreed_at: float | None = None

    def agreed(self, now: float) -> None:
        """Note that both sides have agreed to punch, unless they had before."""
        if self.agreed_at is None:
            self.agreed_at = now

    def punch_ms(self, now: float) -> float:
        """Return the milliseconds since both sides agreed to punch; 0 if never."""
        return (now - self.agreed_at) * 1e3 if self.agreed_at is not None else 0.0


class PunchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The last punch of one plane with a peer.

    Attributes:
        outcome: How it ended.
        endpoints: "ip:port" that were dialled, the first few.
        tries: Dials in all; 0 where nobody counts.
    """

    outcome: Outcome
    endpoints: tuple[Address, ...] = ()
    tries: int = 0


@dataclass
class PeerHistory:
    """What was last tried towards one peer.

    Attributes:
        circuits: By relay, the latest last.
        punches: By plane.
        nat: What the peer last said of its NAT.
    """

    circuits: OrderedDict[PeerId, Outcome] = field(default_factory=OrderedDict)
    punches: dict[Plane, PunchRecord] = field(default_factory=dict)
    nat: NatFacts | None = None


class History:
    """The peers tried last; see the module."""

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, PeerHistory] = OrderedDict()

    def __len__(self) -> int:
        return len(self._peers)

    def of(self, peer: PeerId) -> PeerHistory | None:
        """Return what is remembered of ``peer``."""
        return self._peers.get(peer)

    def on_circuit(self, peer: PeerId, relay: PeerId, ended: Outcome) -> None:
        """Note how dialling ``peer`` through ``relay`` ended."""
        circuits = self._entry(peer).circuits
        circuits.pop(relay, None)
        circuits[relay] = ended
        while len(circuits) > MAX_RELAYS:
            circuits.popitem(last=False)

    def on_punch(
        self, peer: PeerId, plane: Plane, ended: Outcome, notes: PunchNotes
    ) -> None:
        """Note how a punch with ``peer`` ended."""
        entry = self._entry(peer)
        entry.punches[plane] = PunchRecord(
            outcome=ended, endpoints=notes.endpoints[:MAX_ENDPOINTS], tries=notes.tries
        )
        if notes.peer is not None:
            entry.nat = notes.peer

    def _entry(self, peer: PeerId) -> PeerHistory:
        entry = self._peers.setdefault(peer, PeerHistory())
        self._peers.move_to_end(peer)
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return entry
