"""Who writes what: the plans of all ranks merged so that each element is written once.

Every rank says which boxes of which tensors it holds. Boxes that several ranks hold
(replicas) go to one of them, worst fit: the largest first, each to the rank that has
the fewest bytes so far. The result depends on nothing but the plans, so that equal
plans give equal files, step after step.

Boxes that overlap without being equal (a rank holds the whole, others its rows) are cut
apart. Elements that nobody holds are refused before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec

from checkpoints.boxes import Box, intersect, tiling_fault
from checkpoints.dtypes import tensor_bytes
from checkpoints.manifest import Name, Sizes
from fabric.core.codec import Codec
from fabric.core.errors import ConfigError

MAX_PLAN_BYTES = 64 << 20
"""One rank's plan: about a million boxes."""


class HeldTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank holds of a tensor; no box if it only knows of it."""

    name: Name
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Sizes
    boxes: tuple[Box, ...]


class LocalPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank holds; ``aliases``: name -> name in ``tensors``."""

    tensors: tuple[HeldTensor, ...]
    aliases: dict[Name, Name]


class WriteItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A box that a rank writes; it lies in one that the rank holds."""

    name: Name
    box: Box


class RankPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank writes."""

    items: tuple[WriteItem, ...]


class MergedPlan(NamedTuple):
    """What every rank writes, and what the commit must know.

    Attributes:
        ranks: By rank.
        empty: Tensors without elements, by name: nobody writes them.
        aliases: Of all ranks.
    """

    ranks: list[RankPlan]
    empty: dict[str, HeldTensor]
    aliases: dict[str, str]


LOCAL_PLAN_CODEC: Codec[LocalPlan] = Codec(LocalPlan, max_bytes=MAX_PLAN_BYTES)
RANK_PLAN_CODEC: Codec[RankPlan] = Codec(RankPlan, max_bytes=MAX_PLAN_BYTES)


class _Piece(NamedTuple):
    name: str
    box: Box
    size: int
    holders: list[int]


def merge_plans(plans: Sequence[LocalPlan]) -> MergedPlan:
    """Return who writes what.

    Args:
        plans: By rank.

    Raises:
        ConfigError: ranks disagree about a tensor (``E_PLAN``), elements that no rank
            holds (``E_GAP``), names tied on some ranks only (``E_TIED``).
    """
    aliases = _merge_aliases(plans)
    tensors: dict[str, HeldTensor] = {}
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, plan in enumerate(plans):
        for held in plan.tensors:
            if held.name in aliases:
                continue
            known = tensors.setdefault(held.name, held)
            if (known.dtype, known.shape) != (held.dtype, held.shape):
                raise ConfigError(
                    f"{held.name!r} is {known.dtype} {list(known.shape)} on one rank, "
                    f"{held.dtype} {list(held.shape)} on rank {rank}",
                    code="E_PLAN",
                    next_step="give different tensors different names",
                )
            boxes = holders.setdefault(held.name, {})
            for box in held.boxes:
                boxes.setdefault(box, []).append(rank)
    pieces: list[_Piece] = []
    empty: dict[str, HeldTensor] = {}
    for name, held in sorted(tensors.items()):
        parts = _cut_apart(held, holders[name])
        if not parts:
            empty[name] = held
        for box, ranks in parts:
            size = tensor_bytes(held.dtype, box.sizes)
            pieces.append(_Piece(name, box, size, ranks))
    return MergedPlan(_assign(pieces, len(plans)), empty, aliases)


def _merge_aliases(plans: Iterable[LocalPlan]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for plan in plans:
        for alias, target in plan.aliases.items():
            if aliases.setdefault(alias, target) != target:
                raise _tied(alias)
    for plan in plans:
        if any(held.boxes and held.name in aliases for held in plan.tensors):
            raise _tied(next(h.name for h in plan.tensors if h.name in aliases))
    return aliases


def _tied(name: str) -> ConfigError:
    return ConfigError(
        f"{name!r} shares its elements with another name on some ranks only",
        code="E_TIED",
        next_step="tie the weights on all ranks, or on none",
    )


def _cut_apart(
    held: HeldTensor, holders: dict[Box, list[int]]
) -> list[tuple[Box, list[int]]]:
    """Return boxes that tile the tensor, each with the ranks that hold it."""
    whole = [(box, ranks) for box, ranks in holders.items() if box.volume]
    fault = tiling_fault(held.shape, (box for box, _ in whole))
    if fault is None:
        return whole
    parts: list[tuple[Box, list[int]]] = []
    taken: list[Box] = []
    for box, ranks in sorted(whole, key=lambda each: (-each[0].volume, each[0])):
        rest = [box]
        for other in taken:
            rest = [piece for part in rest for piece in subtract(part, other)]
        parts += [(piece, ranks) for piece in rest]
        taken.append(box)
    fault = tiling_fault(held.shape, (box for box, _ in parts))
    if fault is not None:
        raise ConfigError(
            f"{held.name!r}: no rank holds element {list(fault.at)}",
            code="E_GAP",
            next_step="save from all ranks that hold a shard",
        )
    return parts


def subtract(box: Box, other: Box) -> Iterator[Box]:
    """Yield at most 2 * ndim boxes: what of ``box`` is not in ``other``."""
    inner = intersect(box, other)
    if inner is None:
        yield box
        return
    offsets, sizes = list(box.offsets), list(box.sizes)
    for dim, (at, size) in enumerate(zip(inner.offsets, inner.sizes, strict=True)):
        for begin, end in (
            (offsets[dim], at),
            (at + size, offsets[dim] + sizes[dim]),
        ):
            if begin < end:
                yield Box(
                    (*offsets[:dim], begin, *offsets[dim + 1 :]),
                    (*sizes[:dim], end - begin, *sizes[dim + 1 :]),
                )
        offsets[dim], sizes[dim] = at, size


def _assign(pieces: Sequence[_Piece], num_ranks: int) -> list[RankPlan]:
    """Give each piece to one holder: first what has only one, then worst fit."""
    load = [0] * num_ranks
    items: list[list[WriteItem]] = [[] for _ in range(num_ranks)]
    order = sorted(pieces, key=lambda p: (len(p.holders) > 1, -p.size, p.name, p.box))
    for piece in order:
        rank = min(piece.holders, key=lambda each: (load[each], each))
        load[rank] += piece.size
        items[rank].append(WriteItem(piece.name, piece.box))
    return [
        RankPlan(tuple(sorted(mine, key=lambda i: (i.name, i.box)))) for mine in items
    ]
