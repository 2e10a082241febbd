"""Copies between strided places of two buffers, at the speed of a C loop.

A memoryview cast to the width of the elements copies slice to slice with any steps, so
transposed and interleaved tensors need no array library.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Grid(NamedTuple):
    """Where elements lie in a buffer: the first, and the step in each dimension."""

    first: int
    strides: Sequence[int]


def copy_strided(
    source: memoryview,
    at: Grid,
    out: memoryview,
    into: Grid,
    sizes: Sequence[int],
    item: int,
) -> None:
    """Copy a box of ``sizes`` elements from one buffer to another.

    Args:
        source: Bytes read.
        at: Elements of ``source``.
        out: Bytes written; shares none with ``source``.
        into: Elements of ``out``; no two of the same place.
        sizes: Extents of the box.
        item: Bytes of an element: 1, 2, 4 or 8.
    """
    if 0 in sizes:
        return
    read = source[: len(source) // item * item].cast(_FORMATS[item])
    write = out[: len(out) // item * item].cast(_FORMATS[item])
    inner = _inner(sizes, at.strides)
    count, here, there = (
        (sizes[inner], at.strides[inner], into.strides[inner])
        if inner >= 0
        else (1, 1, 1)
    )
    outer = [dim for dim in range(len(sizes)) if dim != inner]
    for index in product(*(range(sizes[dim]) for dim in outer)):
        begin = at.first + _dot(index, [at.strides[dim] for dim in outer])
        place = into.first + _dot(index, [into.strides[dim] for dim in outer])
        write[place : place + (count - 1) * there + 1 : there] = read[
            begin : begin + (count - 1) * here + 1 : here
        ]


def _inner(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the longest dimension that a slice can step through, or -1."""
    candidates = [dim for dim, stride in enumerate(strides) if stride > 0]
    return max(candidates, key=lambda dim: sizes[dim], default=-1)


def _dot(index: Sequence[int], strides: Sequence[int]) -> int:
    return sum(at * stride for at, stride in zip(index, strides, strict=True))
