"""Boxes: rectangles of tensor elements, and the geometry of resharding.

A shard of a tensor is a box (offsets, sizes). Loading any layout from any other is the
intersection of the saved boxes with the wanted ones; everything here is arithmetic on
integers, without I/O.

Rules: the boxes of a saved tensor *tile* it: every element in exactly one. The check is
exact and linear in the number of boxes. The indicator function of a box, multiplied by
prod(1 - x_d), is a polynomial with 2^ndim terms, +1 or -1 at the box's corners; that
factor is not a zero divisor, so the boxes tile the tensor if and only if the sums of
signed corners are equal. Where they differ, the lexicographically first corner is the
first wrong element, and its coefficient says how many boxes too many or too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

Index = tuple[int, ...]


class Box(NamedTuple):
    """Elements ``offsets <= index < offsets + sizes`` of a tensor."""

    offsets: Index
    sizes: Index

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a scalar, 0 if any size is 0."""
        return prod(self.sizes)


class Run(NamedTuple):
    """Elements that lie next to each other in both a source and a target box."""

    source: int
    target: int
    length: int


class TilingFault(NamedTuple):
    """The first element that is not covered exactly once.

    Attributes:
        at: Where.
        covered: How many boxes cover it: 0 is a gap, 2 or more an overlap.
    """

    at: Index
    covered: int


def whole(shape: Sequence[int]) -> Box:
    """Return the box of all elements of a tensor of ``shape``."""
    return Box((0,) * len(shape), tuple(shape))


def inside(box: Box, shape: Sequence[int]) -> bool:
    """Return whether ``box`` has the rank of ``shape`` and lies within it."""
    return len(box.offsets) == len(box.sizes) == len(shape) and all(
        offset >= 0 and size >= 0 and offset + size <= extent
        for offset, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
    )


def intersect(a: Box, b: Box) -> Box | None:
    """Return the box of elements in both, or None if there are none."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = tuple(
        min(ao + asz, bo + bsz)
        for ao, asz, bo, bsz in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def runs(part: Box, source: Box, target: Box) -> Iterator[Run]:
    """Yield the contiguous runs of ``part``, which lies in both other boxes.

    Args:
        part: What to move, in the tensor's coordinates.
        source: Box stored row-major, from which ``part`` is read.
        target: Box stored row-major, into which ``part`` is written.

    Yields:
        Runs in row-major order, in elements from the start of each box.
    """
    if 0 in part.sizes:
        return
    inner = len(part.sizes)
    length = 1
    while inner > 0:
        inner -= 1
        length *= part.sizes[inner]
        if not part.sizes[inner] == source.sizes[inner] == target.sizes[inner]:
            break
    sources = _outer_offsets(part, source, inner)
    targets = _outer_offsets(part, target, inner)
    for source_at, target_at in zip(sources, targets, strict=True):
        yield Run(source_at, target_at, length)


def _outer_offsets(part: Box, container: Box, inner: int) -> Iterator[int]:
    """Yield where each run of ``part`` starts in ``container``, in elements."""
    strides = strides_of(container.sizes)
    first = sum(
        (mine - base) * stride
        for mine, base, stride in zip(
            part.offsets, container.offsets, strides, strict=True
        )
    )
    steps = [
        range(0, part.sizes[dim] * strides[dim], strides[dim]) for dim in range(inner)
    ]
    return (first + sum(step) for step in product(*steps))


def strides_of(shape: Sequence[int]) -> Index:
    """Return the row-major strides of ``shape``, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """Return at most 2 * ndim - 1 boxes that hold a flat interval, in its order.

    Args:
        shape: The tensor's shape.
        begin: First element of the interval, in row-major order.
        end: One past the last.

    Source: ByteCheckpoint (arXiv:2407.20143), decomposition of irregular shards.
    """
    if not 0 <= begin <= end <= prod(shape):
        raise ValueError(f"interval {begin}..{end} outside shape {tuple(shape)}")
    if begin == end:
        return []
    if not shape:
        return [Box((), ())]
    inner = prod(shape[1:])
    row, row_begin = divmod(begin, inner)
    last_row, last_end = divmod(end, inner)
    if row == last_row:
        return _in_row(row, flat_boxes(shape[1:], row_begin, last_end))
    boxes: list[Box] = []
    if row_begin:
        boxes += _in_row(row, flat_boxes(shape[1:], row_begin, inner))
        row += 1
    if last_row > row:
        rest = whole(shape[1:])
        boxes.append(Box((row, *rest.offsets), (last_row - row, *rest.sizes)))
    if last_end:
        boxes += _in_row(last_row, flat_boxes(shape[1:], 0, last_end))
    return boxes


def _in_row(row: int, boxes: list[Box]) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.sizes)) for box in boxes]


def tiling_fault(shape: Sequence[int], boxes: Iterable[Box]) -> TilingFault | None:
    """Return None if ``boxes`` cover each element of ``shape`` exactly once.

    Args:
        shape: The tensor's shape.
        boxes: Each inside the tensor and not empty.
    """
    corners: Counter[Index] = Counter()
    for box in boxes:
        _add_corners(corners, box, 1)
    target = whole(shape)
    if target.volume:
        _add_corners(corners, target, -1)
    wrong = [(index, count) for index, count in corners.items() if count]
    if not wrong:
        return None
    index, excess = min(wrong)
    return TilingFault(index, excess + 1)


def _add_corners(corners: Counter[Index], box: Box, weight: int) -> None:
    edges = [
        ((offset, 1), (offset + size, -1))
        for offset, size in zip(box.offsets, box.sizes, strict=True)
    ]
    for corner in product(*edges):
        index = tuple(at for at, _ in corner)
        corners[index] += weight * prod(sign for _, sign in corner)
