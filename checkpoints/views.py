"""Tensors that are made of boxes of other tensors: split, merged, turned, stacked.

A view is a list of pieces; a piece says which box of the view is which box of a source
tensor, and which axis is which. That is all that maps between the forms of a model
family need, and whether a map loses or repeats an element is the tiling check of
:mod:`checkpoints.boxes` on either side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import prod

import msgspec

from checkpoints.boxes import (
    Box,
    Index,
    flat_boxes,
    intersect,
    runs,
    strides_of,
    whole,
)
from checkpoints.dtypes import item_bytes
from checkpoints.formats.source import Source, StoredShape
from checkpoints.hashed_file import Buffer
from checkpoints.strided import Grid, copy_strided

NEW_AXIS = -1


class Piece(msgspec.Struct, frozen=True):
    """A box of a view, and where its elements are.

    Attributes:
        target: The box in the view.
        source: Name of the tensor that holds it.
        box: The box there.
        axes: For each axis of the view the axis of the source, or :data:`NEW_AXIS` for
            one of extent 1; axes of the source not named have extent 1 in ``box``.
    """

    target: Box
    source: str
    box: Box
    axes: tuple[int, ...]

    @property
    def turned(self) -> bool:
        """Whether axes are in another order than in the source."""
        axes = [axis for axis in self.axes if axis != NEW_AXIS]
        return axes != sorted(axes)


class View(msgspec.Struct, frozen=True):
    """A tensor made of pieces, sorted by their place, which tile it.

    Attributes:
        dtype: Element type, of all its sources.
        shape: Its shape.
        pieces: One at least.
        reach: Longest extent of a piece along the first axis.
    """

    dtype: str
    shape: Index
    pieces: tuple[Piece, ...]
    reach: int

    @property
    def sources(self) -> list[str]:
        """Names of the tensors it is made of, each once."""
        return list(dict.fromkeys(piece.source for piece in self.pieces))

    @property
    def turned(self) -> bool:
        """Whether axes are in another order than in a source."""
        return any(piece.turned for piece in self.pieces)

    def begins(self) -> str:
        """Return the tensor whose first elements this view is, in order, or ""."""
        if len(self.pieces) != 1:
            return ""
        (piece,) = self.pieces
        same = piece.target == piece.box == whole(self.shape)
        return piece.source if same and piece.axes == identity(self.shape) else ""


def identity(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of a piece that turns nothing."""
    return tuple(range(len(shape)))


def view_of(name: str, entry: StoredShape) -> View:
    """Return a tensor as it is."""
    box = whole(entry.shape)
    piece = Piece(box, name, box, identity(entry.shape))
    return view_from(entry.dtype, entry.shape, [piece])


def view_from(dtype: str, shape: Index, pieces: Iterable[Piece]) -> View:
    """Return the view of these pieces, in any order."""
    ordered = tuple(sorted(pieces, key=lambda piece: piece.target.offsets))
    reach = max((piece.target.sizes[0] for piece in ordered if shape), default=0)
    return View(dtype, shape, ordered, reach)


class ViewReader:
    """Reads views from a source, in one thread.

    Args:
        source: Used by nobody else at the same time.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._scratch = bytearray()

    def windows(self, view: View, box: Box, window_bytes: int) -> Iterator[Buffer]:
        """Yield the bytes of a box of ``view``, row-major, in bounded memory.

        Each buffer is overwritten by the next.
        """
        plain = view.begins()
        if plain and box.sizes == view.shape == self._source.entry(plain).shape:
            yield from self._source.windows(plain, window_bytes)
            return
        item = item_bytes(view.dtype)
        total = prod(box.sizes)
        step = max(1, window_bytes // item)
        buffer = memoryview(bytearray(min(step, total) * item))
        for begin in range(0, total, step):
            at = 0
            for part in flat_boxes(box.sizes, begin, min(begin + step, total)):
                stop = at + part.volume * item
                self.fill(view, _shifted(part, box.offsets), buffer[at:stop])
                at = stop
            yield buffer[:at]

    def fill(self, view: View, box: Box, out: memoryview) -> None:
        """Fill ``out`` with one box of ``view``."""
        item = item_bytes(view.dtype)
        filled = 0
        for piece in near(view, box):
            part = intersect(piece.target, box)
            if part is None:
                continue
            self._fill_part(view, piece, part, box, out, item)
            filled += part.volume * item
        assert filled == len(out)  # the pieces tile the view: checked when planned

    def _fill_part(
        self,
        view: View,
        piece: Piece,
        part: Box,
        box: Box,
        out: memoryview,
        item: int,
    ) -> None:
        wanted = in_source(piece, part)
        if not piece.turned:
            few = list(islice(runs(part, part, box), 2))
            if len(few) == 1:
                begin = few[0].target * item
                place = out[begin : begin + part.volume * item]
                self._read(view, piece.source, wanted, place)
                return
        data = self._buffer(part.volume * item)
        self._read(view, piece.source, wanted, data)
        source_steps = strides_of(wanted.sizes)
        steps = [0 if axis == NEW_AXIS else source_steps[axis] for axis in piece.axes]
        into = strides_of(box.sizes)
        offsets = zip(part.offsets, box.offsets, into, strict=True)
        first = sum((at - base) * step for at, base, step in offsets)
        copy_strided(data, Grid(0, steps), out, Grid(first, into), part.sizes, item)

    def _read(self, view: View, name: str, box: Box, out: memoryview) -> None:
        self._source.read_box(name, box.offsets, box.sizes, out, dtype=view.dtype)

    def _buffer(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        return memoryview(self._scratch)[:size]


def near(view: View, box: Box) -> Iterator[Piece]:
    """Yield the pieces that may share elements with ``box``: few of very many."""
    if not box.offsets:
        yield from view.pieces
        return
    lowest = box.offsets[0] - view.reach
    first = bisect_right(view.pieces, lowest, key=lambda each: each.target.offsets[0])
    end = box.offsets[0] + box.sizes[0]
    for piece in islice(view.pieces, first, None):
        if piece.target.offsets[0] >= end:
            return
        yield piece


def in_source(piece: Piece, part: Box) -> Box:
    """Return where ``part`` of a piece's target lies in its source."""
    offsets, sizes = list(piece.box.offsets), list(piece.box.sizes)
    for dim, axis in enumerate(piece.axes):
        if axis != NEW_AXIS:
            offsets[axis] += part.offsets[dim] - piece.target.offsets[dim]
            sizes[axis] = part.sizes[dim]
    return Box(tuple(offsets), tuple(sizes))


def _shifted(box: Box, by: Index) -> Box:
    offsets = zip(box.offsets, by, strict=True)
    return Box(tuple(at + more for at, more in offsets), box.sizes)


def through(
    view: View, box: Box, target: Box, axes: tuple[int, ...]
) -> Iterator[Piece]:
    """Yield pieces that put ``box`` of a view at ``target``.

    Args:
        view: Where the elements come from, itself made of pieces.
        box: The elements wanted, in the view.
        target: Where they go.
        axes: As in :class:`checkpoints.views.Piece`, with the view as source.
    """
    outer = Piece(target, "", box, axes)
    for piece in near(view, box):
        part = intersect(piece.target, box)
        if part is None:
            continue
        inner = in_source(piece, part)
        turned = tuple(
            NEW_AXIS if axis == NEW_AXIS else piece.axes[axis] for axis in axes
        )
        yield Piece(_back(outer, part), piece.source, inner, turned)


def _back(piece: Piece, part: Box) -> Box:
    """Return where ``part`` of a piece's source lies in its target."""
    offsets, sizes = list(piece.target.offsets), list(piece.target.sizes)
    for dim, axis in enumerate(piece.axes):
        if axis != NEW_AXIS:
            offsets[dim] += part.offsets[axis] - piece.box.offsets[axis]
            sizes[dim] = part.sizes[axis]
    return Box(tuple(offsets), tuple(sizes))
