"""How many admission attempts are served: pure token buckets and an in-flight bound.

Peer ids cost an attacker nothing, so a bound per peer alone does not stop a flood, and
a bound over all peers alone lets a flood lock members out. Therefore: members have
their own bucket each and draw on nothing shared; newcomers share one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from fabric.core.ids import PeerId

MAX_TRACKED_PEERS = 4096
"""Buckets kept; the one unused for longest goes first, and comes back full."""


@dataclass
class Bucket:
    """Tokens that refill evenly; starts full."""

    capacity: float
    per_second: float
    tokens: float
    at: float

    def take(self, now: float) -> float:
        """Take a token; return 0.0, or the seconds until there is one."""
        self.tokens = min(
            self.capacity, self.tokens + (now - self.at) * self.per_second
        )
        self.at = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.per_second


@dataclass
class AttemptLimits:
    """Decides whether one more inbound exchange is served.

    Attributes:
        per_peer: Attempts per minute of one peer.
        newcomers: Attempts per minute of all peers that are not members, together.
        max_exchanges: Exchanges in flight at once; newcomers may fill all but a
            quarter, which stays for members.
    """

    per_peer: int = 6
    newcomers: int = 120
    max_exchanges: int = 32
    _peers: OrderedDict[PeerId, Bucket] = field(default_factory=OrderedDict)
    _shared: Bucket | None = None
    _in_flight: set[PeerId] = field(default_factory=set)

    def begin(self, peer: PeerId, *, member: bool, now: float) -> float:
        """Start an exchange; return 0.0, or the seconds to wait before asking again.

        Every 0.0 is paired with one :meth:`end`.
        """
        if peer in self._in_flight:
            return 1.0
        room = self.max_exchanges - (0 if member else self.max_exchanges // 4)
        if len(self._in_flight) >= room:
            return 1.0
        wait = self._bucket(peer, now).take(now)
        if not wait and not member:
            wait = self._newcomers(now).take(now)
        if not wait:
            self._in_flight.add(peer)
        return wait

    def end(self, peer: PeerId) -> None:
        """End an exchange that :meth:`begin` started."""
        self._in_flight.remove(peer)

    def _bucket(self, peer: PeerId, now: float) -> Bucket:
        bucket = self._peers.pop(peer, None)
        if bucket is None:
            bucket = Bucket(self.per_peer, self.per_peer / 60, self.per_peer, now)
        self._peers[peer] = bucket
        if len(self._peers) > MAX_TRACKED_PEERS:
            self._peers.popitem(last=False)
        return bucket

    def _newcomers(self, now: float) -> Bucket:
        if self._shared is None:
            rate = self.newcomers
            self._shared = Bucket(rate, rate / 60, rate, now)
        return self._shared
