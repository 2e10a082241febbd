"""How many bytes a collective moves over each link: exact, as shares of its volume.

A gather turns "each rank holds its share among ``held``" into "each rank holds its
share among ``needed``", a finer partition. Every place takes in what its ranks need and
do not hold, once, and spreads it inside: nothing crosses a link twice. That is the
least there can be, and what gathers along one mesh axis after the other come to. A
reduce-scatter is the same backwards: reduced inside first, then sent on.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from fabric.jobs.plan.ground import Ground, Place
from fabric.jobs.plan.partitions import Partition


class Flow(NamedTuple):
    """What one collective moves, in parts of the volume it gathers.

    Attributes:
        into: Into each place, in the order of ``Ground.root.walk``.
        out: Out of each place.
        moved: Between the places within a place of level n, all of them; from level 1.
        latency: Seconds of one message over each level that it crosses.
        slowness: Seconds per byte of volume at the slowest boundary.
        level: Of the place whose boundary is the slowest; -1: nothing is moved.
        coded: What the busiest rank takes or gives, and so codes or decodes.
    """

    into: tuple[Fraction, ...]
    out: tuple[Fraction, ...]
    moved: tuple[Fraction, ...]
    latency: float
    slowness: float
    level: int
    coded: Fraction


def gather(ground: Ground, held: Partition, needed: Partition) -> Flow:
    """Return what it takes to go from shares of ``held`` to those of ``needed``.

    Args:
        ground: The ranks and their places.
        held: Groups that hold one copy each before.
        needed: Finer groups that hold one copy each afterwards; of one rank each when
            every rank needs everything.
    """
    into: dict[tuple[int, int, int], Fraction] = {}
    out: dict[tuple[int, int, int], Fraction] = {}
    for group in held.groups:
        _descend(ground.root, group, needed, into, out, Fraction(0), Fraction(0))
    return _flow(ground, into, out)


def scatter(ground: Ground, held: Partition, needed: Partition) -> Flow:
    """Return what :func:`gather` moves, backwards: a reduce-scatter."""
    flow = gather(ground, held, needed)
    slowness, level = _slowest(ground, flow.out, flow.into)
    return flow._replace(into=flow.out, out=flow.into, slowness=slowness, level=level)


def ring(ground: Ground, held: Partition) -> Flow:
    """Return what a flat ring over each group moves: it knows of no places.

    Each rank sends (n - 1) / n of the volume to the next, so that much crosses the
    boundary of every place in both directions.
    """
    into: dict[tuple[int, int, int], Fraction] = {}
    for place in ground.root.walk():
        total = Fraction(0)
        for start, stop in held.groups:
            inside = min(stop, place.stop) - max(start, place.start)
            if 0 < inside < stop - start:
                total += Fraction(stop - start - 1, stop - start)
        into[_key(place)] = total
    return _flow(ground, into, into)


def spread(ground: Ground, islands: Partition) -> Flow:
    """Return what it takes to send each island's whole copy to every other one.

    Of a volume each. Each rank of an island sends and takes its share; a place that
    holds several islands takes each foreign copy once for each of its own.
    """
    count = len(islands.groups)
    into: dict[tuple[int, int, int], Fraction] = {}
    for place in ground.root.walk():
        total = Fraction(0)
        for start, stop in islands.groups:
            inside = max(0, min(stop, place.stop) - max(start, place.start))
            total += Fraction(inside, stop - start)
        into[_key(place)] = (
            total * (count - total) if total > 1 else total * (count - 1)
        )
    return _flow(ground, into, into)


def _key(place: Place) -> tuple[int, int, int]:
    return place.level, place.start, place.stop


def _descend(
    place: Place,
    group: tuple[int, int],
    needed: Partition,
    into: dict[tuple[int, int, int], Fraction],
    out: dict[tuple[int, int, int], Fraction],
    entering: Fraction,
    leaving: Fraction,
) -> None:
    """Add what ``group`` moves over the boundaries within ``place``."""
    mine = _overlap(place, group)
    inside = [child for child in place.children if _overlap(child, group)]
    takes = [_lacks(child, group, needed) for child in inside]
    local = sum(takes, Fraction(0)) - entering
    for child, take in zip(inside, takes, strict=True):
        share = Fraction(_overlap(child, group), mine)
        give = (local + leaving) * share
        key = _key(child)
        into[key] = into.get(key, Fraction(0)) + take
        out[key] = out.get(key, Fraction(0)) + give
        if child.children:
            _descend(child, group, needed, into, out, take, give)


def _overlap(place: Place, group: tuple[int, int]) -> int:
    return max(0, min(place.stop, group[1]) - max(place.start, group[0]))


def _lacks(place: Place, group: tuple[int, int], needed: Partition) -> Fraction:
    """Return what the ranks of ``place`` in ``group`` need together and do not hold."""
    start, stop = max(place.start, group[0]), min(place.stop, group[1])
    need, at = Fraction(0), start
    while at < stop and need < 1:
        low, high = needed.group_of(at)
        # a tail of one group and a head of the next: the shares need not be the same
        need += Fraction(min(stop, high) - at, high - low)
        at = high
    return min(need, Fraction(1)) - Fraction(stop - start, group[1] - group[0])


def _flow(
    ground: Ground,
    into: dict[tuple[int, int, int], Fraction],
    out: dict[tuple[int, int, int], Fraction],
) -> Flow:
    places = list(ground.root.walk())
    zero = Fraction(0)
    ins = tuple(into.get(_key(place), zero) for place in places)
    outs = tuple(out.get(_key(place), zero) for place in places)
    moved = [zero] * ground.root.level
    waits = [0.0] * ground.root.level
    by_key = {_key(place): each for place, each in zip(places, ins, strict=True)}
    for place in places:
        if place.children:
            taken = sum((by_key[_key(child)] for child in place.children), zero)
            moved[place.level - 1] += taken - by_key[_key(place)]
            if taken > by_key[_key(place)]:
                rtt = max(child.rtt_seconds for child in place.children)
                waits[place.level - 1] = max(waits[place.level - 1], rtt / 2)
    slowness, level = _slowest(ground, ins, outs)
    ranks = [at for at, place in enumerate(places) if not place.children]
    coded = max(max(ins[at], outs[at]) for at in ranks)
    return Flow(ins, outs, tuple(moved), sum(waits), slowness, level, coded)


def _slowest(
    ground: Ground, into: tuple[Fraction, ...], out: tuple[Fraction, ...]
) -> tuple[float, int]:
    slowest, level = 0.0, -1
    for place, taken, given in zip(ground.root.walk(), into, out, strict=True):
        seconds = max(float(taken) / place.down, float(given) / place.up)
        if seconds > slowest:
            slowest, level = seconds, place.level
    return slowest, level
