"""Which dimension of a tensor the ranks of tensor parallelism share."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

import msgspec


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Patterns of names and the dimension that is split."""

    dim: int
    names: list[str]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    split: list[Split]


@cache
def tensor_parallel_dims() -> tuple[tuple[str, int], ...]:
    """Return pattern of names -> dimension, in the order in which they are tried."""
    text = (files("checkpoints.layouts") / "tensor-parallel.toml").read_text()
    parsed = msgspec.convert(tomllib.loads(text), _File)
    return tuple((name, each.dim) for each in parsed.split for name in each.names)
