"""Ways to cut all ranks into groups that hold one copy of something together.

Groups are intervals of ranks: whole places of a level, or half, a quarter, ... of what
a place holds. Halves of an odd number differ by one, so no size needs to divide
another, and every finer partition that is made here is nested in the coarser ones.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

import msgspec

from fabric.jobs.plan.ground import Ground, Place

MAX_PARTITIONS = 24
"""Enough for a handful of levels of a thousand ranks each."""


class Partition(msgspec.Struct, frozen=True, dict=True):
    """All ranks in groups, each an interval.

    Attributes:
        stops: The rank after the last of each group; ascending.
        label: For people: "host", "site/2".
    """

    stops: tuple[int, ...]
    label: str = ""

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Return (start, stop) of each group."""
        return tuple(zip((0, *self.stops[:-1]), self.stops, strict=True))

    @cached_property
    def degree(self) -> str:
        """Return the sizes of the groups: "8", or "2-3" where they differ."""
        sizes = [stop - start for start, stop in self.groups]
        low, high = min(sizes), max(sizes)
        return str(low) if low == high else f"{low}-{high}"

    def group_of(self, rank: int) -> tuple[int, int]:
        """Return the group of ``rank``."""
        return self.groups[bisect_right(self.stops, rank)]

    def is_within(self, other: Partition) -> bool:
        """Return whether each group lies in one of ``other``."""
        return set(other.stops) <= set(self.stops)


def partitions(ground: Ground) -> tuple[Partition, ...]:
    """Return the partitions to choose from, finest first, each within the next."""
    found: dict[tuple[int, ...], Partition] = {}
    for level in range(ground.root.level + 1):
        name = ground.levels[level - 1] if level else "rank"
        halved = _halvings(ground.root.at(level))
        for index, stops in enumerate(reversed(halved)):
            parts = 2 ** (len(halved) - 1 - index)
            label = name if parts == 1 else f"{name}/{parts}"
            found.setdefault(stops, Partition(stops, label))
    ordered = sorted(found.values(), key=lambda each: -len(each.stops))
    if len(ordered) > MAX_PARTITIONS:  # whole levels first, then the coarser parts
        whole = [each for each in ordered if "/" not in each.label]
        parts = [each for each in ordered if "/" in each.label]
        kept = {each.stops for each in (*whole, *parts[::-1])[:MAX_PARTITIONS]}
        ordered = [each for each in ordered if each.stops in kept]
    return tuple(ordered)


def _halvings(places: tuple[Place, ...]) -> list[tuple[int, ...]]:
    """Return the stops of whole places, of their halves, ... down to their children."""
    rows: list[list[Place]] = [[place] for place in places]
    found = [_stops(rows)]
    rows = [list(place.children) or [place] for place in places]
    pieces = [[row] for row in rows]
    while any(len(piece) > 2 for row in pieces for piece in row):
        pieces = [[half for piece in row for half in _halves(piece)] for row in pieces]
        found.append(_stops([piece for row in pieces for piece in row]))
    return found


def _halves(piece: list[Place]) -> list[list[Place]]:
    if len(piece) <= 2:
        return [piece]
    middle = (len(piece) + 1) // 2
    return [piece[:middle], piece[middle:]]


def _stops(pieces: list[list[Place]]) -> tuple[int, ...]:
    return tuple(piece[-1].stop for piece in pieces)
