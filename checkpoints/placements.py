"""Which elements of a tensor a member of a mesh holds, as boxes.

Each mesh axis that shards a dim cuts the indices that the axes before it left. A plain
shard cuts them in order into equal runs, the last ones shorter; a strided shard cuts
them into ``split_factor`` runs first and takes its share of each, which is how FSDP
over tensor parallelism keeps the order of the tensor-parallel shards. So what is held
of one dim is a list of intervals, and what is held of the tensor is their product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from checkpoints.boxes import Box, Index


class Split(NamedTuple):
    """One mesh axis cuts one dim.

    Attributes:
        dim: The dim of the tensor.
        parts: Size of the mesh axis.
        place: Our coordinate on it.
        split_factor: Runs that are cut apart first; 1 for a plain shard.
    """

    dim: int
    parts: int
    place: int
    split_factor: int = 1


class HeldBox(NamedTuple):
    """A box of the tensor, and where it begins in the local tensor."""

    box: Box
    local: Index


class _Run(NamedTuple):
    begin: int
    length: int


def held_boxes(shape: Sequence[int], splits: Iterable[Split]) -> list[HeldBox]:
    """Return what one member holds of a tensor of ``shape``; nothing empty.

    Args:
        shape: Global shape.
        splits: In the order of the mesh's axes.
    """
    runs = [[_Run(0, extent)] for extent in shape]
    for split in splits:
        runs[split.dim] = _cut(runs[split.dim], split)
    held = []
    for chosen in product(*(_with_local(each) for each in runs)):
        box = Box(
            tuple(run.begin for run, _ in chosen),
            tuple(run.length for run, _ in chosen),
        )
        if box.volume:
            held.append(HeldBox(box, tuple(local for _, local in chosen)))
    return held


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """Return begin and end of part ``index``: equal parts, the last ones shorter."""
    step = -(-length // parts)
    return min(step * index, length), min(step * (index + 1), length)


def _cut(runs: Sequence[_Run], split: Split) -> list[_Run]:
    length = sum(run.length for run in runs)
    taken: list[_Run] = []
    for number in range(split.split_factor):
        first, last = chunk_bounds(length, split.split_factor, number)
        begin, end = chunk_bounds(last - first, split.parts, split.place)
        taken += _slice(runs, first + begin, first + end)
    return _merged(taken)


def _slice(runs: Sequence[_Run], begin: int, end: int) -> list[_Run]:
    """Return elements ``begin <= at < end`` of the indices in ``runs``."""
    out = []
    at = 0
    for run in runs:
        low = max(begin, at)
        high = min(end, at + run.length)
        if low < high:
            out.append(_Run(run.begin + low - at, high - low))
        at += run.length
    return out


def _merged(runs: Iterable[_Run]) -> list[_Run]:
    out: list[_Run] = []
    for run in runs:
        if out and out[-1].begin + out[-1].length == run.begin:
            out[-1] = _Run(out[-1].begin, out[-1].length + run.length)
        else:
            out.append(run)
    return out


def _with_local(runs: Sequence[_Run]) -> list[tuple[_Run, int]]:
    out = []
    at = 0
    for run in runs:
        out.append((run, at))
        at += run.length
    return out
