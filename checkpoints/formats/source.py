"""What every checkpoint that can be read looks like to the converter.

Names are canonical whatever the format: parameters and buffers are ``model/<name>``, an
optimizer's per-parameter tensors ``optimizer/<slot>/<name>`` (``exp_avg``,
``exp_avg_sq``, ``step``, ``fp32`` for master weights), everything that is no tensor is
JSON in ``state``. What a format holds and we do not carry over is in ``ignored``, with
the reason: nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import msgspec

from checkpoints.boxes import Box
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import Json

MODEL = "model/"
OPTIMIZER = "optimizer/"


class Ignored(msgspec.Struct, frozen=True):
    """Something of a source that is not carried over: a file, tensor or value."""

    name: str
    reason: str


class StoredShape(Protocol):
    """The type and shape of a stored tensor."""

    @property
    def dtype(self) -> str:
        """Element type, by its safetensors name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        ...


class Source(Protocol):
    """A checkpoint open for reading by one thread; a context manager.

    Opening reads indexes only, never elements, and executes nothing it finds.
    """

    @property
    def format(self) -> str:
        """Its name in the registry, such as "canonical"."""
        ...

    @property
    def path(self) -> Path:
        """The file or directory."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name -> name of the tensor it shares its elements with (tied weights)."""
        ...

    @property
    def state(self) -> Mapping[str, Json]:
        """Everything that is not a tensor."""
        ...

    @property
    def ignored(self) -> Sequence[Ignored]:
        """What is not carried over, and why."""
        ...

    def names(self) -> list[str]:
        """Return the names of all tensors and aliases, sorted."""
        ...

    def entry(self, name: str) -> StoredShape:
        """Return type and shape of a tensor or alias.

        Raises:
            ConfigError: there is none of that name.
        """
        ...

    def boxes(self, name: str) -> Sequence[Box]:
        """Return the boxes in which the elements of a tensor are stored."""
        ...

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

        Raises:
            ConfigError: no such tensor or box, or not of type ``dtype``.
            IntegrityError: the bytes are damaged or missing.
        """
        ...

    def windows(self, name: str, window_bytes: int = ...) -> Iterator[Buffer]:
        """Yield a tensor's bytes in row-major order, in bounded memory.

        Each buffer is overwritten by the next.
        """
        ...

    def fork(self) -> Self:
        """Return a source of the same index with files of its own, for a thread."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
