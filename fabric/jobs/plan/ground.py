"""What a plan stands on: ranks in places within places, each with its way out.

The ways in and out of a place are shared by all its ranks, as a host's network card
and a site's router are. Ranks are numbered so that every place is an interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

UNSHARED = math.inf
"""Bytes per second of a boundary that limits nothing."""


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process and what it has.

    Attributes:
        name: For people.
        peer: The daemon it belongs to.
        memory_bytes: What a plan may use; 0: not known, not limited.
        flops: Floating-point operations per second that training reaches on it.
    """

    name: str
    peer: str = ""
    memory_bytes: int = 0
    flops: float = 1e11


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A rank, a host, a site: what is behind one way in and out.

    Attributes:
        name: For people.
        level: 0 for a rank.
        start: Its first rank.
        stop: The rank after its last.
        up: Bytes per second out of it, all its ranks together.
        down: Bytes per second into it.
        rtt_seconds: To others in the place around it.
        children: The places within.
    """

    name: str
    level: int
    start: int
    stop: int
    up: float = UNSHARED
    down: float = UNSHARED
    rtt_seconds: float = 0.0
    children: tuple[Place, ...] = ()

    @property
    def size(self) -> int:
        """Return how many ranks it has."""
        return self.stop - self.start

    def walk(self) -> Iterator[Place]:
        """Yield this place and those within, outer ones first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def at(self, level: int) -> tuple[Place, ...]:
        """Return the largest places of at most ``level``; together all ranks."""
        if self.level <= level:
            return (self,)
        return tuple(place for child in self.children for place in child.at(level))


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """All ranks of a job.

    Attributes:
        root: The place of all.
        ranks: By number.
        levels: Name of the links between the places of level n - 1, from level 1 on.
        reasons: Why the places are what they are.
    """

    root: Place
    ranks: tuple[Rank, ...]
    levels: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Return what all ranks reach together."""
        return sum(rank.flops for rank in self.ranks)
