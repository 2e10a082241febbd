"""What torch passes to a process group, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

OfTorch = Any
"""Option objects, or the single values of torch's other form of a call."""


def listed(tensors: OfTorch) -> list[Tensor]:
    """Return a list of tensors, whether it was one or not."""
    return list(tensors) if isinstance(tensors, list | tuple) else [tensors]


def by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return ``tensors`` by dtype: one address space has one."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def reduce_op(opts: OfTorch) -> tuple[str, float]:
    """Return the name and the factor of a reduce operation."""
    op = getattr(opts, "reduceOp", opts)
    if op is None:
        return "SUM", 1.0
    name = str(getattr(op, "op", op)).rsplit(".", 1)[-1]
    if name != "PREMUL_SUM":
        return name, 1.0
    return name, float(op.__getstate__()[1])


def split(tensor: Tensor, splits: Sequence[int], size: int) -> list[Tensor]:
    """Return the slices of ``tensor`` for each rank, along its first dim."""
    if splits:
        return list(tensor.split(list(splits)))
    return list(tensor.split(tensor.shape[0] // size)) if tensor.numel() else []
