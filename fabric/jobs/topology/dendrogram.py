"""Average linkage over the pairs that were measured: which peers join first.

A pair that nobody measured says nothing: two clusters are as far apart as the mean of
the measured pairs between them, and clusters without one join last. Sokal and Michener
1958 (UPGMA). Sums are of integers, so the order of additions cannot matter, and a mean
is one division, which IEEE 754 rounds alike everywhere.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from fabric.core.ids import PeerId
from fabric.jobs.topology.distances import Links, distance


class Join(NamedTuple):
    """A cluster of the dendrogram.

    Attributes:
        members: In the order of their ids.
        height: Mean distance between its two parts; None: no pair was measured.
        parts: The two clusters it joins; empty for a single peer.
    """

    members: tuple[PeerId, ...]
    height: float | None
    parts: tuple[Join, ...] = ()


def dendrogram(order: tuple[PeerId, ...], links: Links) -> Join:
    """Return the tree of all of ``order``, at least one, by their ``links``."""
    linkage = _Linkage(order)
    number_of = {peer: number for number, peer in enumerate(order)}
    for (one, other), link in links.items():
        far = distance(link)
        if far is not None:
            linkage.note(number_of[one], number_of[other], (far, 1))
    return linkage.run()


_Sum = tuple[int, int]  # of distances, and how many


class _Linkage:
    """Clusters by number; the heap may name some that are gone."""

    def __init__(self, order: tuple[PeerId, ...]) -> None:
        self._clusters = {n: Join((peer,), None) for n, peer in enumerate(order)}
        self._sums: dict[int, dict[int, _Sum]] = {n: {} for n in self._clusters}
        self._heap: list[tuple[float, PeerId, PeerId, int, int]] = []
        self._next = len(order)

    def note(self, one: int, two: int, total: _Sum) -> None:
        """Remember a distance; of equal ones the lower ids go first."""
        self._sums[one][two] = self._sums[two][one] = total
        clusters = self._clusters
        low, high = sorted((clusters[one].members[0], clusters[two].members[0]))
        heapq.heappush(self._heap, (total[0] / total[1], low, high, one, two))

    def run(self) -> Join:
        """Join until no measurement is left; return what holds everybody."""
        while self._heap:
            height, _, _, one, two = heapq.heappop(self._heap)
            if one in self._clusters and two in self._clusters:
                self._join(one, two, height)
        left = sorted(self._clusters.values(), key=lambda join: join.members)
        if len(left) == 1:
            return left[0]
        members = tuple(sorted(peer for join in left for peer in join.members))
        return Join(members, None, tuple(left))

    def _join(self, one: int, two: int, height: float) -> None:
        both = self._clusters.pop(one), self._clusters.pop(two)
        parts = tuple(sorted(both, key=lambda join: join.members))
        members = tuple(sorted(parts[0].members + parts[1].members))
        # missing pairs can make a join nearer than its parts': it is no nearer
        heights = [height, *(part.height for part in parts if part.height is not None)]
        new, self._next = self._next, self._next + 1
        self._clusters[new] = Join(members, max(heights), parts)
        sums = self._sums
        old, sums[new] = (sums.pop(one), sums.pop(two)), {}
        for other in sorted((old[0].keys() | old[1].keys()) - {one, two}):
            found = [each[other] for each in old if other in each]
            for gone in (one, two):
                sums[other].pop(gone, None)
            total = sum(far for far, _ in found), sum(count for _, count in found)
            self.note(new, other, total)
