"""What reading boxes and windows of tensors is, wherever the elements are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

from checkpoints.boxes import Box, flat_boxes, inside
from checkpoints.dtypes import item_bytes, tensor_bytes
from checkpoints.formats.source import StoredShape
from checkpoints.hashed_file import Buffer
from checkpoints.parts import WINDOW_BYTES
from fabric.core.errors import ConfigError

E = TypeVar("E", bound=StoredShape)


class BoxReader(ABC, Generic[E]):
    """Checks what is asked for; who inherits fills buffers with stored elements.

    Attributes:
        path: The file or directory.
        aliases: Name -> name of the stored tensor it shares its elements with.
    """

    def __init__(
        self, path: Path, stored: Mapping[str, E], aliases: Mapping[str, str]
    ) -> None:
        self.path = path
        self.aliases = aliases
        self._stored = stored

    @abstractmethod
    def _fill(self, entry: E, box: Box, out: memoryview) -> None:
        """Fill ``out`` with ``box``, which lies inside the tensor, row-major."""

    def names(self) -> list[str]:
        """Return the names of all tensors and aliases, sorted."""
        return sorted([*self._stored, *self.aliases])

    def entry(self, name: str) -> E:
        """Return the entry of a tensor or of an alias's target.

        Raises:
            ConfigError: there is none of that name.
        """
        entry = self._stored.get(self.aliases.get(name, name))
        if entry is None:
            raise ConfigError(
                f"no tensor {name!r} in {self.path}",
                code="E_NO_TENSOR",
                next_step="`fabric-ckpt inspect` lists the names",
            )
        return entry

    def read_box(
        self,
        name: str,
        offsets: Sequence[int],
        sizes: Sequence[int],
        out: bytearray | memoryview,
        *,
        dtype: str = "",
    ) -> None:
        """Fill ``out`` with one box of a tensor, row-major, little-endian.

        Args:
            name: Tensor or alias.
            offsets: First element in each dimension.
            sizes: Elements in each dimension.
            out: Writable, of exactly the box's bytes.
            dtype: Element type that the caller expects; empty = whatever is stored.

        Raises:
            ConfigError: no such tensor or box, or of another type: nothing is cast.
            IntegrityError: the bytes are damaged or missing; ``out`` is then undefined.
        """
        entry = self.entry(name)
        if dtype and dtype != entry.dtype:
            raise ConfigError(
                f"{name!r} is {entry.dtype}, wanted {dtype}",
                code="E_DTYPE",
                next_step="load it as stored and convert it yourself",
            )
        box = Box(tuple(offsets), tuple(sizes))
        if not inside(box, entry.shape):
            raise ConfigError(
                f"{name!r}: {box} outside shape {list(entry.shape)}", code="E_BOUNDS"
            )
        view = memoryview(out).cast("B")
        if len(view) != tensor_bytes(entry.dtype, box.sizes):
            raise ValueError(f"{name!r}: buffer of {len(view)} B for {box}")
        if view:
            self._fill(entry, box, view)

    def windows(self, name: str, window_bytes: int = WINDOW_BYTES) -> Iterator[Buffer]:
        """Yield a tensor's bytes in row-major order, in bounded memory.

        Each buffer is overwritten by the next.
        """
        entry = self.entry(name)
        item = item_bytes(entry.dtype)
        total = prod(entry.shape)
        step = max(1, window_bytes // item)
        view = memoryview(bytearray(min(step, total) * item))
        for begin in range(0, total, step):
            at = 0
            for box in flat_boxes(entry.shape, begin, min(begin + step, total)):
                stop = at + box.volume * item
                self._fill(entry, box, view[at:stop])
                at = stop
            yield view[:at]
