"""How tensors are dealt to the files of ranks: one writer per rank, as training saves.

The cut of a checkpoint says nothing about its content: a reader takes any box of any
cut. It decides which bytes lie together for the ranks that will read them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import msgspec

from checkpoints.boxes import Box, Index, whole
from fabric.core.errors import ConfigError

MAX_WORLD = 65_536

Layout = Literal["fsdp", "tp"]


class Cut(msgspec.Struct, frozen=True):
    """A world of ranks and how they share tensors.

    Attributes:
        layout: "fsdp": rows, as torch.chunk does; "tp": the dimension that tensor
            parallelism splits, by the tensor's name, evenly or not at all.
        world: Number of ranks.
        dims: Of "tp": pattern of names -> dimension; the first that matches counts.
    """

    layout: Layout
    world: int
    dims: tuple[tuple[str, int], ...] = ()

    def shares(self, name: str, shape: Index) -> list[tuple[int, Box]]:
        """Return which rank holds which box; the boxes tile the tensor.

        What is not split, such as scalars and names without a pattern, is rank 0's.
        """
        dim = self._dim(name, shape)
        if dim < 0 or 0 in shape:
            return [(0, whole(shape))]
        rows = -(-shape[dim] // self.world)
        return [
            (rank, _slab(shape, dim, begin, min(begin + rows, shape[dim])))
            for rank, begin in enumerate(range(0, shape[dim], rows))
        ]

    def _dim(self, name: str, shape: Index) -> int:
        """Return the dimension that is split, or -1."""
        if not shape:
            return -1
        if self.layout == "fsdp":
            return 0
        for pattern, dim in self.dims:
            if fnmatchcase(name, pattern):
                fits = dim < len(shape) and shape[dim] % self.world == 0
                return dim if fits else -1
        return -1


def check_cut(cut: Cut) -> None:
    """Pass if the world is of a size that makes sense.

    Raises:
        ConfigError: it is not.
    """
    if not 1 <= cut.world <= MAX_WORLD:
        raise ConfigError(f"world {cut.world} is not in 1..{MAX_WORLD}")


def _slab(shape: Index, dim: int, begin: int, end: int) -> Box:
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dim] = begin
    sizes[dim] = end - begin
    return Box(tuple(offsets), tuple(sizes))
