"""Whose link to probe, when, and what is known of it: the policy of link probing.

Pure. Both ends of a probe learn the link, so a pair is probed by whoever finds it too
old first. A link that carries traffic is not disturbed: what it carries is measured.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable

import msgspec
from blake3 import blake3

from fabric.core.ids import PeerId
from fabric.net.ports import LinkMeasurement
from fabric.net.traversal_api import ConnectionKind
from nat.probe.config import ProbeConfig

_MAX_REMEMBERED = 1024
"""Peers that had themselves probed, remembered for the interval."""


class _Link(msgspec.Struct):
    due: float
    measured: LinkMeasurement | None = None
    failures: int = 0
    peak_up: float = 0.0  # of real traffic since the measurement
    peak_down: float = 0.0


def choose(
    me: PeerId,
    members: Iterable[PeerId],
    most: int,
    near: Collection[PeerId] = frozenset(),
) -> tuple[PeerId, ...]:
    """Return at most ``most`` of ``members`` to measure, the same at every call.

    A pair has one score at both ends, so both tend to choose it or not (rendezvous
    hashing, Thaler and Ravishankar 1998). Half of the places are for those ``near``:
    by chance alone a large job's neighbours would hardly be measured together, and
    nothing would show that they are neighbours.
    """

    def score(other: PeerId) -> bytes:
        return blake3("\0".join(sorted((me, other))).encode()).digest()

    others = sorted({peer for peer in members if peer != me}, key=score)
    first = [peer for peer in others if peer in near][: most // 2]
    rest = [peer for peer in others if peer not in set(first)]
    return tuple(first + rest[: most - len(first)])


class ProbeBook:
    """What is known of each link, and which is probed next.

    Args:
        me: Our PeerId.
        config: Ages and limits.
        rng: Spreads the probes of peers that started together.
    """

    def __init__(self, me: PeerId, config: ProbeConfig, rng: random.Random) -> None:
        self._me = me
        self._config = config
        self._rng = rng
        self._links: dict[PeerId, _Link] = {}

    def set_members(
        self,
        members: Iterable[PeerId],
        now: float,
        near: Collection[PeerId] = frozenset(),
    ) -> None:
        """Measure the links with these peers (a choice of them) and no others.

        Args:
            members: Of our jobs.
            now: Monotonic seconds.
            near: Those that may be at our site.
        """
        chosen = choose(self._me, members, self._config.max_links, near)
        first = self._config.jitter * self._config.retry_seconds
        self._links = {
            peer: self._links.get(peer)
            or _Link(now + first * len(chosen) * self._rng.random() / 8)
            for peer in chosen
        }

    def links(self) -> dict[PeerId, LinkMeasurement]:
        """Return every measurement known."""
        return {
            peer: link.measured
            for peer, link in self._links.items()
            if link.measured is not None
        }

    def link(self, peer: PeerId) -> LinkMeasurement | None:
        """Return the last measurement of the link with ``peer``."""
        link = self._links.get(peer)
        return link.measured if link is not None else None

    def is_fresh(self, peer: PeerId, now: float) -> bool:
        """Return whether the measurement is no older than the configured age."""
        known = self.link(peer)
        age = self._config.max_age_seconds
        return known is not None and now - known.measured_at <= age

    def due(self, now: float) -> PeerId | None:
        """Return the peer to probe now, the longest overdue first."""
        peer = min(self._links, key=lambda p: self._links[p].due, default=None)
        return peer if peer is not None and self._links[peer].due <= now else None

    def next_due(self) -> float | None:
        """Return when :meth:`due` may next have an answer."""
        return min((link.due for link in self._links.values()), default=None)

    def note_traffic(self, peer: PeerId, up: float, down: float) -> None:
        """Take note of what a link carries, in bytes per second."""
        link = self._links.get(peer)
        if link is not None:
            link.peak_up = max(link.peak_up, up)
            link.peak_down = max(link.peak_down, down)

    def is_busy(self, up: float, down: float) -> bool:
        """Return whether a link that carries this is not to be probed."""
        return max(up, down) >= self._config.busy_bytes_per_second

    def take_traffic(
        self, peer: PeerId, rtt: float, path: ConnectionKind, now: float
    ) -> None:
        """Let the traffic of a busy link stand for its measurement.

        Traffic shows what a link carries at least: more than known replaces it.
        """
        link = self._links.get(peer)
        if link is None:
            return
        known = link.measured or LinkMeasurement(rtt_seconds=rtt)
        same = known if known.path == path else LinkMeasurement(rtt_seconds=rtt)
        self.measured(
            peer,
            LinkMeasurement(
                rtt_seconds=rtt,
                up_bytes_per_second=max(link.peak_up, same.up_bytes_per_second),
                down_bytes_per_second=max(link.peak_down, same.down_bytes_per_second),
                measured_at=now,
                path=path,
            ),
            now,
        )

    def measured(self, peer: PeerId, link: LinkMeasurement, now: float) -> None:
        """Take a measurement; a peer that is no member keeps none."""
        known = self._links.get(peer)
        if known is not None:
            self._links[peer] = _Link(now + self._wait(), link)

    def failed(self, peer: PeerId, now: float) -> None:
        """Try again later: 1, 2, 4 ... times the first wait, up to the age."""
        link = self._links.get(peer)
        if link is not None:
            wait = self._config.retry_seconds * 2 ** min(link.failures, 16)
            link.failures += 1
            link.due = now + min(wait, self._wait())

    def _wait(self) -> float:
        early = self._config.jitter * self._rng.random()
        return self._config.max_age_seconds * (1 - early)


class ProbeAllowance:
    """How often others may have us send a probe's bytes."""

    def __init__(self, config: ProbeConfig) -> None:
        self._config = config
        self._last: OrderedDict[PeerId, float] = OrderedDict()
        self._recent: deque[float] = deque(maxlen=max(1, config.max_serves_per_minute))

    def take(self, peer: PeerId, now: float) -> float:
        """Return 0 and count a probe for ``peer``, or the seconds until its turn."""
        interval = self._config.min_serve_interval_seconds
        wait = self._last.get(peer, -interval) + interval - now
        full = len(self._recent) == self._recent.maxlen
        if full:
            wait = max(wait, self._recent[0] + 60.0 - now)
        if wait > 0:
            return min(wait, max(interval, 60.0))  # sums of floats may exceed it
        self._recent.append(now)
        self._last[peer] = now
        self._last.move_to_end(peer)
        if len(self._last) > _MAX_REMEMBERED:
            self._last.popitem(last=False)
        return 0.0
