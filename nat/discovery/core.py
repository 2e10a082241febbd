"""The core of rendezvous discovery: where to register, whom to ask, what is known.

    candidates --first few that answer--> points
    a point:   register --(half of the TTL)--> register again
               ask ------(about a minute)----> ask again, from the cookie on

Two islands of one mesh merge when they share one point: each side finds addresses of
peers that it is not connected with, the peer book dials them, admission appraises them
and reconciliation does the rest. So what is found is never more than a hint, and peers
that are found but not connected are what `fabric doctor` calls an island.

Candidates of one class are ordered by a hash with the namespace, so that peers who know
different but overlapping sets still prefer the same points.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from fabric.core.digest import rendezvous_order
from fabric.core.errors import FabricError
from fabric.core.ids import MeshId, PeerId
from nat.discovery.config import DiscoveryConfig
from nat.discovery.rendezvous_messages import Status
from nat.discovery.rendezvous_records import PeerRecord, Sighting

NAMESPACE_CONTEXT = "peerfabric 2026-01 rendezvous namespace of a mesh"
FIRST_RETRY_SECONDS = 5.0
MAX_RETRY_SECONDS = 600.0
HURRY_SECONDS = 5.0
"""A change of network asks a point again no sooner than this after the last time."""
MAX_TRIED = 8
"""Candidates that are visited at all, however many of them fail."""
MAX_FOUND = 1000
"""Peers kept of what the points say."""
FULL_EVERY = 10
"""Every tenth question asks for everybody: who unregistered is dropped by that."""


FEW_PEERS = 48
"""So many peers may ask a point once per pause; with more the pause grows."""
MAX_STRETCH = 20.0


def namespace_of(mesh: MeshId) -> str:
    """Return where the members of ``mesh`` register.

    One-way and bound to this use, so that a point learns neither the mesh's id nor what
    its members announce elsewhere; others cannot guess it.
    """
    digest = blake3(mesh.encode(), derive_key_context=NAMESPACE_CONTEXT)
    return "fabric/" + digest.hexdigest()[:32]


def order_points(
    namespace: str, groups: Iterable[Collection[PeerId]], own: PeerId
) -> tuple[PeerId, ...]:
    """Return rendezvous candidates, group by group, within each by hash."""
    found: dict[PeerId, None] = {}
    for group in groups:
        ordered = rendezvous_order(namespace.encode(), group)
        found |= dict.fromkeys(PeerId(name) for name in ordered)
    found.pop(own, None)
    return tuple(found)


class Visit(msgspec.Struct, frozen=True):
    """Go to a point, register if told so, and ask.

    Attributes:
        point: Where.
        register: Whether the registration must be renewed.
        cookie: From where on to ask; empty for everybody.
    """

    point: PeerId
    register: bool
    cookie: bytes


class PointReport(msgspec.Struct, frozen=True):
    """How it stands with one point, for `fabric doctor`.

    Attributes:
        point: Who.
        registered: We are known there.
        failures: Visits in a row that failed.
        error: Why the last one failed, or empty.
    """

    point: PeerId
    registered: bool
    failures: int
    error: str


class Islands(msgspec.Struct, frozen=True):
    """What rendezvous knows of the mesh, against what we are connected with.

    Attributes:
        found: Peers in our namespace, without ourselves.
        unconnected: Those of them that we have no connection with.
        points: The points in use.
    """

    found: tuple[PeerId, ...]
    unconnected: tuple[PeerId, ...]
    points: tuple[PointReport, ...]

    @property
    def sentence(self) -> str:
        """One line that says it."""
        if not self.points:
            return "no rendezvous point is known"
        known = sum(point.registered for point in self.points)
        if not known:
            return f"registered at none of {len(self.points)} rendezvous points"
        if self.unconnected:
            return (
                f"rendezvous knows {len(self.unconnected)} members that we are not "
                "connected with"
            )
        return f"registered at {known} rendezvous points, no island is known"


@dataclass
class _Point:
    visiting: bool = False
    visited_at: float = float("-inf")
    visits: int = 0
    failures: int = 0
    error: FabricError | None = None
    cookie: bytes = b""
    next_at: float = 0.0
    registered_until: float = float("-inf")
    renew_at: float = 0.0


@dataclass
class _Known:
    record: PeerRecord
    until: float
    points: set[PeerId]


class Discovery:
    """See the module.

    Args:
        own: Our id.
        config: Periods and numbers.
        rng: Spreads the questions of many peers.
    """

    def __init__(
        self, own: PeerId, config: DiscoveryConfig, rng: random.Random
    ) -> None:
        self._own = own
        self._config = config
        self._rng = rng
        self._addrs: tuple[str, ...] = ()
        self._points: dict[PeerId, _Point] = {}
        self._order: list[PeerId] = []
        self._found: dict[PeerId, _Known] = {}

    def set_candidates(self, candidates: Sequence[PeerId]) -> None:
        """Use these points, best first."""
        kept = [peer for peer in candidates if peer != self._own][:MAX_TRIED]
        # a visit under way is remembered even if its point is no candidate now: it may
        # be one again before the visit ends
        under_way = {peer: p for peer, p in self._points.items() if p.visiting}
        self._points = {
            peer: self._points.get(peer) or _Point() for peer in kept
        } | under_way
        self._order = kept

    def set_addrs(self, addrs: Sequence[str]) -> None:
        """Register these addresses: at once where others are registered."""
        if tuple(addrs) != self._addrs:
            self._addrs = tuple(addrs)
            for point in self._points.values():
                point.renew_at = 0.0
                point.next_at = min(point.next_at, point.visited_at + HURRY_SECONDS)

    def hurry(self, now: float) -> None:
        """Ask all points again soon: the network changed, or nobody is left."""
        for point in self._points.values():
            point.next_at = min(
                point.next_at, max(now, point.visited_at + HURRY_SECONDS)
            )

    def _chosen(self) -> list[tuple[PeerId, _Point]]:
        """Return the first candidates that work, and those before them that do not."""
        chosen = []
        working = 0
        for peer, point in ((peer, self._points[peer]) for peer in self._order):
            if working == self._config.rendezvous_points:
                break
            chosen.append((peer, point))
            working += point.failures == 0
        return chosen

    def due(self, now: float) -> list[Visit]:
        """Return the visits to make now; each must be reported as done or failed."""
        visits = []
        for peer, point in self._chosen():
            if point.visiting or point.next_at > now:
                continue
            point.visiting = True
            point.visited_at = now
            full = point.visits % FULL_EVERY == 0
            visits.append(
                Visit(
                    peer,
                    bool(self._addrs) and point.renew_at <= now,
                    b"" if full else point.cookie,
                )
            )
        return visits

    def next_timeout(self) -> float | None:
        """Return when :meth:`due` may have something, or None."""
        times = [p.next_at for _, p in self._chosen() if not p.visiting]
        return min(times, default=None)

    def on_registered(self, peer: PeerId, ttl_seconds: float, now: float) -> None:
        """Note that ``peer`` knows us for this long."""
        point = self._points.get(peer)
        if point is not None:
            point.registered_until = now + ttl_seconds
            # half of it: a point that is away for a while must not lose us
            point.renew_at = now + ttl_seconds / 2

    def on_found(
        self, visit: Visit, sightings: Iterable[Sighting], cookie: bytes, now: float
    ) -> None:
        """Note what the point of ``visit`` answered: the visit is done."""
        if not visit.cookie:
            self._forget_told_by(visit.point)
        listed = False
        for sighting in sightings:
            listed |= sighting.record.peer == self._own
            self._note(sighting, visit.point, now)
        point = self._points.get(visit.point)
        if point is None:
            return
        if not (visit.cookie or listed):
            point.renew_at = 0.0  # it was asked for everybody and does not know us
        point.visiting = False
        point.visits += 1
        point.failures = 0
        point.error = None
        point.cookie = cookie
        # a point answers all members: the more there are, the more seldom they ask
        stretch = min(max(1.0, len(self._found) / FEW_PEERS), MAX_STRETCH)
        pause = self._config.discover_seconds * stretch
        point.next_at = now + pause * self._rng.uniform(0.75, 1.25)

    def on_failed(self, visit: Visit, error: FabricError, now: float) -> None:
        """Note why a visit failed, and when to go there again."""
        point = self._points.get(visit.point)
        if point is None:
            return
        point.visiting = False
        point.failures += 1
        point.error = error
        point.cookie = b""
        point.visits = 0
        if error.code == Status.E_INVALID_COOKIE.name:
            # it has restarted and knows nobody: come back at once, and register
            point.renew_at = point.next_at = 0.0
            point.failures = min(point.failures - 1, 1)
            return
        longest = FIRST_RETRY_SECONDS * 2 ** min(point.failures - 1, 16)
        jitter = self._rng.uniform(0.5, 1.0)
        point.next_at = now + jitter * min(longest, MAX_RETRY_SECONDS)

    def _forget_told_by(self, point: PeerId) -> None:
        for peer in list(self._found):
            known = self._found[peer]
            known.points.discard(point)
            if not known.points:
                del self._found[peer]

    def _note(self, sighting: Sighting, point: PeerId, now: float) -> None:
        record = sighting.record
        if record.peer == self._own:
            return
        known = self._found.get(record.peer)
        if known is None:
            if len(self._found) >= MAX_FOUND:
                self._drop_expired(now)
            if len(self._found) >= MAX_FOUND:
                return
            known = self._found[record.peer] = _Known(record, now, set())
        known.points.add(point)
        known.until = max(known.until, now + sighting.ttl_seconds)
        if record.seq >= known.record.seq:
            known.record = record

    def _drop_expired(self, now: float) -> None:
        for peer in [p for p, known in self._found.items() if known.until <= now]:
            del self._found[peer]

    def hints(
        self, connected: Collection[PeerId], now: float
    ) -> dict[PeerId, tuple[str, ...]]:
        """Return addresses of the peers found that we are not connected with."""
        self._drop_expired(now)
        return {
            peer: known.record.addrs
            for peer, known in self._found.items()
            if peer not in connected and known.record.addrs
        }

    def islands(self, connected: Collection[PeerId], now: float) -> Islands:
        """Return how the mesh looks from the points."""
        self._drop_expired(now)
        found = tuple(sorted(self._found))
        return Islands(
            found,
            tuple(peer for peer in found if peer not in connected),
            tuple(
                PointReport(
                    peer,
                    point.registered_until > now,
                    point.failures,
                    "" if point.error is None else point.error.reason,
                )
                for peer, point in self._chosen()
            ),
        )
