"""Where DeepSpeed's ZeRO puts the elements of each parameter.

ZeRO lays the parameters of a group end to end in one vector and gives each rank a part
of it (stages 1 and 2), or gives each rank a part of each parameter and lays those end
to end (stage 3). A parameter is then a list of fragments, one per rank that has some
of it, in the order of its elements. Everything here is arithmetic on integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from checkpoints.boxes import flat_boxes
from checkpoints.dtypes import item_bytes
from checkpoints.formats.extent_source import Extent, StoredTensor
from fabric.core.errors import IntegrityError

Shape = tuple[int, ...]

INCOMPLETE = "a rank's file is missing or of another save: use another copy"


class Fragment(NamedTuple):
    """Elements ``start <= at < start + numel`` of a rank's part of a group."""

    rank: int
    start: int
    numel: int


class Flat(NamedTuple):
    """A rank's part of a group in its file: ``size`` elements from byte ``begin``."""

    dtype: str
    file: str
    begin: int
    size: int


def weights_fragments(
    shapes: Mapping[str, Shape], size: int, world: int
) -> dict[str, list[Fragment]]:
    """Return the fragments of a group of stage 3.

    Args:
        shapes: Of the group's parameters, in its order.
        size: Elements of each rank's part.
        world: Number of ranks.

    Raises:
        IntegrityError: the parameters do not fill the parts (``E_LAYOUT``).
    """
    result: dict[str, list[Fragment]] = {}
    start = 0
    for name, shape in shapes.items():
        numel = prod(shape)
        share = -(-numel // world)
        held = [max(0, min(share, numel - rank * share)) for rank in range(world)]
        result[name] = [Fragment(r, start, n) for r, n in enumerate(held) if n]
        start += share
    if start != size:
        raise IntegrityError(
            f"parameters of {start} elements per rank in parts of {size}",
            code="E_LAYOUT",
            next_step=INCOMPLETE,
        )
    return result


def group_fragments(
    shapes: Mapping[str, Shape], paddings: Sequence[int], sizes: Sequence[int]
) -> dict[str, list[Fragment]]:
    """Return the fragments of a group of stages 1 and 2.

    All parts have the size of the first: it has padding only if it holds the whole
    group. The padding at the end of the group is saved by some optimizers, and cut off
    by others.

    Args:
        shapes: Of the group's parameters, in its order.
        paddings: Elements left out after each parameter.
        sizes: Elements of each rank's part.

    Raises:
        IntegrityError: the parts are too few or too small (``E_GAP``), or larger than
            the parameters (``E_OVERLAP``).
    """
    size = max(1, sizes[0])
    result: dict[str, list[Fragment]] = {}
    at = 0
    for (name, shape), gap in zip(shapes.items(), paddings, strict=True):
        end = at + prod(shape)
        fragments = result[name] = []
        while at < end:
            rank, start = divmod(at, size)
            if rank >= len(sizes):
                raise _misfit(name, "end before it", "E_GAP")
            fragments.append(Fragment(rank, start, min(end - at, size - start)))
            at += fragments[-1].numel
        at = end + gap
    at -= paddings[-1] if paddings else 0
    for rank, held in enumerate(sizes):
        lean = max(0, min(size, at - rank * size))
        if held not in (lean, size):
            code = "E_GAP" if held < lean else "E_OVERLAP"
            name = f"rank {rank}"
            raise _misfit(name, f"have {held} elements for {lean}", code)
    return result


def _misfit(what: str, how: str, code: str) -> IntegrityError:
    return IntegrityError(
        f"{what!r}: the ranks' parts {how}", code=code, next_step=INCOMPLETE
    )


def flat_tensor(
    name: str, shape: Shape, fragments: Sequence[Fragment], parts: Mapping[int, Flat]
) -> StoredTensor:
    """Return a parameter (or a moment of it) as boxes of its fragments.

    Args:
        name: For the message.
        shape: Its shape.
        fragments: In the order of its elements; they are all of them.
        parts: Rank -> where its part lies.

    Raises:
        IntegrityError: a fragment is outside its part (``E_SIZE``), or the parts have
            several types (``E_MIXED``).
    """
    dtypes = {part.dtype for part in parts.values()}
    if len(dtypes) != 1:
        raise IntegrityError(
            f"{name!r} is {' and '.join(sorted(dtypes))}",
            code="E_MIXED",
            next_step=INCOMPLETE,
        )
    dtype = dtypes.pop()
    item = item_bytes(dtype)
    extents: list[Extent] = []
    at = 0
    for rank, start, numel in fragments:
        part = parts[rank]
        if start + numel > part.size:
            raise IntegrityError(
                f"{name!r}: elements {start}..{start + numel} of a part of "
                f"{part.size} in {part.file}",
                code="E_SIZE",
                next_step=INCOMPLETE,
            )
        begin = part.begin + start * item
        for box in flat_boxes(shape, at, at + numel):
            extents.append(Extent(box, part.file, begin))
            begin += box.volume * item
        at += numel
    return StoredTensor(dtype, shape, tuple(extents))
