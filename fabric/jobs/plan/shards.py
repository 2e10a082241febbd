"""Where the shards of a scheme lie: boxes of the flat parameter space, by rank.

Weights are cut in the order of ranks. Gradients are chosen within the weights a rank
holds, and optimizer states within its gradients, so that nothing is moved that is there
already. Sizes need not divide: where a coarser group mixes finer ones of different
sizes, whoever's box ends first is served first (earliest deadline first, which finds a
schedule of one machine whenever there is one: Liu and Layland 1973).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from fabric.jobs.plan.partitions import Partition

Box = tuple[int, int]
"""Start and stop in the flat parameter space."""
Boxes = tuple[Box, ...]


class RankShards(msgspec.Struct, frozen=True):
    """What one rank holds of weights, gradients and optimizer states; ascending."""

    weights: Boxes
    gradients: Boxes
    states: Boxes


def shards_of(
    numel: int, weights: Partition, gradients: Partition, states: Partition
) -> tuple[RankShards, ...]:
    """Return the shards of each rank: within each group every parameter once.

    Args:
        numel: Parameters in all.
        weights: Groups that hold them together.
        gradients: The same, no finer.
        states: The same, no finer.
    """
    held: list[Boxes] = []
    for start, stop in weights.groups:
        size = stop - start
        held += [
            _boxes((n * numel // size, (n + 1) * numel // size)) for n in range(size)
        ]
    reduced = _within(numel, held, gradients)
    stepped = _within(numel, reduced, states)
    return tuple(map(RankShards, held, reduced, stepped))


def _boxes(*boxes: Box) -> Boxes:
    return tuple(box for box in boxes if box[0] < box[1])


def _within(numel: int, held: Sequence[Boxes], part: Partition) -> list[Boxes]:
    """Return a part of what each rank holds: in each group of ``part`` all of it."""
    found: list[Boxes] = []
    for start, stop in part.groups:
        found += _deal(numel, held[start:stop])
    return found


def _deal(numel: int, held: Sequence[Boxes]) -> list[Boxes]:
    """Deal out all positions among ranks that hold them, as evenly as they can be."""
    count = len(held)
    left = [(n + 1) * numel // count - n * numel // count for n in range(count)]
    dealt: list[list[Box]] = [[] for _ in held]
    edges = sorted({edge for boxes in held for box in boxes for edge in box})
    for low, high in pairwise(edges):
        able = [n for n in range(count) if any(a <= low < b for a, b in held[n])]
        able.sort(key=lambda n: (held[n][-1][1], n))
        at = low
        for rank in able:
            take = min(left[rank], high - at)
            if take > 0:
                _add(dealt[rank], (at, at + take))
                left[rank] -= take
                at += take
        if at < high:  # rounding, or nobody else holds it: the last one takes the rest
            rank = max(able, key=lambda n: (left[n], n))
            _add(dealt[rank], (at, high))
            left[rank] -= high - at
    return [tuple(boxes) for boxes in dealt]


def _add(boxes: list[Box], box: Box) -> None:
    if boxes and boxes[-1][1] == box[0]:
        boxes[-1] = (boxes[-1][0], box[1])
    else:
        boxes.append(box)
