"""What a rank holds of a tensor, whatever holds it: boxes, and views of their elements.

A plain tensor is the whole; a DTensor is what its mesh and placements say; a flat shard
is an interval of the flattened tensor, cut into boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from checkpoints.boxes import Box, Index, flat_boxes, intersect, whole
from checkpoints.part_layout import ChunkPlan
from checkpoints.placements import HeldBox, Split, held_boxes
from checkpoints.save_plan import HeldTensor, LocalPlan
from checkpoints.torch_io.tensors import dtype_name
from fabric.core.errors import ConfigError


@dataclass(frozen=True)
class FlatShard:
    """Elements ``begin ..`` of a flattened tensor.

    Attributes:
        data: 1-D; written and filled in place.
        shape: Shape of the whole tensor.
        begin: Place of the first element, in row-major order.
    """

    data: torch.Tensor
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class FlatShards:
    """Several intervals of one flattened tensor; at least one.

    Attributes:
        parts: Of the same shape and element type; they do not overlap.
    """

    parts: tuple[FlatShard, ...]


Value = torch.Tensor | FlatShard | FlatShards
"""A tensor, DTensor, flat shard or several of one tensor."""


@dataclass(frozen=True)
class Piece:
    """A box of the tensor, and its elements: a view whose shape is the box's sizes."""

    box: Box
    view: torch.Tensor


@dataclass(frozen=True)
class Held:
    """A tensor's element type, global shape, and the pieces held here."""

    dtype: str
    shape: Index
    pieces: tuple[Piece, ...]

    def chunk(self, name: str, box: Box) -> ChunkPlan:
        """Return a box of the tensor as a chunk to be written."""
        return ChunkPlan(name, self.dtype, self.shape, box)

    def view(self, box: Box) -> torch.Tensor:
        """Return the elements of a box that lies in one of the pieces."""
        for piece in self.pieces:
            if piece.box == box:
                return piece.view
            if intersect(piece.box, box) == box:
                begins = zip(box.offsets, piece.box.offsets, strict=True)
                return _part(piece.view, tuple(a - b for a, b in begins), box.sizes)
        raise ValueError(f"{box} is not held")


def held_of(name: str, value: Value) -> Held:
    """Return what ``value`` holds.

    Raises:
        ConfigError: no dense tensor with elements (``E_TENSOR``), unreduced partial
            sums (``E_PARTIAL``), or a shard that is not of its placement's size.
    """
    if isinstance(value, FlatShard):
        return _of_flat(name, value)
    if isinstance(value, FlatShards):
        held = [_of_flat(name, part) for part in value.parts]
        if len({(each.dtype, each.shape) for each in held}) != 1:
            raise ConfigError(f"{name!r}: shards that differ in kind", code="E_SHARD")
        pieces = tuple(piece for each in held for piece in each.pieces)
        return Held(held[0].dtype, held[0].shape, pieces)
    if isinstance(value, DTensor):
        return _of_dtensor(name, value)
    tensor = _dense(name, value)
    box = whole(tensor.shape)
    pieces = (Piece(box, tensor),) if box.volume else ()
    return Held(_dtype(name, tensor), box.sizes, pieces)


@torch.no_grad()
def survey(tensors: Mapping[str, Value]) -> tuple[LocalPlan, dict[str, Held]]:
    """Return the plan of this rank, and what it holds by name.

    Names of the same elements (tied weights) are held once and recorded as aliases.
    """
    held: dict[str, Held] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, value in tensors.items():
        found = held_of(name, value)
        first = seen.setdefault(_identity(name, found), name)
        if first == name:
            held[name] = found
        else:
            aliases[name] = first
    plan = tuple(
        HeldTensor(name, each.dtype, each.shape, tuple(p.box for p in each.pieces))
        for name, each in held.items()
    )
    return LocalPlan(plan, aliases), held


def _identity(name: str, held: Held) -> object:
    """Return what two names of the same elements have in common."""
    if not held.pieces:
        return name
    views = tuple(
        (p.box, p.view.device, p.view.data_ptr(), p.view.stride()) for p in held.pieces
    )
    return (held.dtype, held.shape, views)


def _of_flat(name: str, shard: FlatShard) -> Held:
    data = _dense(name, shard.data)
    if data.dim() != 1:
        raise ConfigError(
            f"{name!r}: a flat shard of {data.dim()} dims", code="E_SHARD"
        )
    end = shard.begin + data.numel()
    if not 0 <= shard.begin <= end <= prod(shard.shape):
        raise ConfigError(
            f"{name!r}: elements {shard.begin}..{end} of {list(shard.shape)}",
            code="E_SHARD",
        )
    pieces = []
    at = 0
    for box in flat_boxes(shard.shape, shard.begin, end):
        pieces.append(Piece(box, data[at : at + box.volume].view(box.sizes)))
        at += box.volume
    return Held(_dtype(name, data), tuple(shard.shape), tuple(pieces))


def _of_dtensor(name: str, value: DTensor) -> Held:
    local = _dense(name, value.to_local())
    shape = tuple(value.shape)
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        return Held(_dtype(name, local), shape, ())
    splits = tuple(
        split
        for axis, placement in enumerate(value.placements)
        if (
            split := _split(
                name, placement, value.device_mesh.size(axis), coordinate[axis]
            )
        )
    )
    boxes = _held_boxes(shape, splits)
    volume = sum(held.box.volume for held in boxes)
    if volume != local.numel():
        raise ConfigError(
            f"{name!r}: a local tensor of {list(local.shape)}, but placements "
            f"{value.placements} give {volume} elements",
            code="E_SHARD",
            next_step="make it with distribute_tensor, or pass the right shape",
        )
    pieces = tuple(Piece(h.box, _part(local, h.local, h.box.sizes)) for h in boxes)
    return Held(_dtype(name, local), shape, pieces)


def _part(tensor: torch.Tensor, begins: Index, sizes: Index) -> torch.Tensor:
    """Return a box of a tensor: the tensor itself if that is all of it."""
    if tuple(tensor.shape) != sizes:
        for dim, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            tensor = tensor.narrow(dim, begin, size)
    return tensor


@lru_cache(maxsize=4096)
def _held_boxes(shape: Index, splits: tuple[Split, ...]) -> tuple[HeldBox, ...]:
    return tuple(held_boxes(shape, splits))


def _split(name: str, placement: Placement, parts: int, place: int) -> Split | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Split(placement.dim, parts, place, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Split(placement.dim, parts, place)
    reason = "sums that are not reduced" if isinstance(placement, Partial) else ""
    raise ConfigError(
        f"{name!r} is placed as {placement}: {reason or 'an unknown placement'}",
        code="E_PARTIAL",
        next_step="redistribute it to Shard or Replicate first",
    )


def _dense(name: str, value: torch.Tensor) -> torch.Tensor:
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.device.type == "meta"
        or value.is_quantized
    ):
        raise ConfigError(
            f"{name!r} is no dense tensor with elements, but {_describe(value)}",
            code="E_TENSOR",
            next_step="materialise it, or leave it out",
        )
    return value.detach()


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.layout} on {value.device}"
    return f"a {type(value).__qualname__}"


def _dtype(name: str, tensor: torch.Tensor) -> str:
    try:
        return dtype_name(tensor.dtype)
    except ValueError as exc:
        raise ConfigError(f"{name!r}: {exc}", code="E_DTYPE") from exc
