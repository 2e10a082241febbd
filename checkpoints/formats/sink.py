"""What every format that can be written looks like to the converter.

A sink *plans*: it says which files the target has and what each holds, and touches no
disk. The converter then writes the files (side by side, each synced and journalled, so
that a run that was cut off goes on), lets the sink write its indexes, opens the result
as a source, compares it with what was asked for, and renames it into place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from checkpoints.boxes import Box
from checkpoints.cuts import Cut
from checkpoints.dtypes import tensor_bytes
from checkpoints.formats.source import Ignored
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import FileEntry, Json

MAX_SHARD_BYTES = 5 << 30
"""What transformers' save_pretrained cuts at, in round numbers."""


class OutTensor(msgspec.Struct, frozen=True):
    """A whole tensor to be written.

    Attributes:
        name: Canonical name (see :mod:`checkpoints.formats.source`).
        dtype: Element type, safetensors name.
        shape: Its shape.
        read: Returns its bytes, row-major and little-endian, in buffers that stay valid
            until the next one is asked for; may be called again.
        read_box: The same for one box of it, for a sink that cuts tensors; what is
            read of a tensor in this way must tile it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Buffer]]
    read_box: Callable[[Box], Iterable[Buffer]] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return tensor_bytes(self.dtype, self.shape)


class Bundle(msgspec.Struct, frozen=True):
    """Everything that is to be written.

    Attributes:
        tensors: By canonical name.
        aliases: Canonical name -> name in ``tensors``.
        state: Everything that is not a tensor.
    """

    tensors: Mapping[str, OutTensor]
    aliases: Mapping[str, str]
    state: Mapping[str, Json]


class SinkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to write; a sink ignores what means nothing to its format.

    Attributes:
        max_shard_bytes: Tensor bytes per file; a larger tensor gets one of its own.
        step: Number of the saved step, where the format has one.
        parent: Root of the canonical checkpoint before it, or empty.
        cut: How tensors are dealt to ranks' files; None leaves them whole. Only for a
            sink that has ``takes_cut = True``.
    """

    max_shard_bytes: int = MAX_SHARD_BYTES
    step: int = 0
    parent: str = ""
    cut: Cut | None = None


class PlannedFile(msgspec.Struct, frozen=True):
    """One file of the target.

    Attributes:
        path: Relative to the target's directory, with forward slashes.
        tensors: Canonical names whose elements it holds; for the report.
        size_bytes: Its size, or a good estimate; for the progress.
        chunks: Yields its bytes in order, in bounded memory; the converter writes and
            hashes them. Called again if the run is repeated.
    """

    path: str
    tensors: tuple[str, ...]
    size_bytes: int
    chunks: Callable[[], Iterator[Buffer]]


class Plan(msgspec.Struct, frozen=True):
    """What a sink would write.

    Attributes:
        files: In any order; they can be written side by side.
        finish: Writes and syncs the format's indexes into the directory, given the
            entries of the planned files by path: see ``hashes``.
        ignored: What of the bundle the format has no place for, and why: canonical
            names of tensors, "state.<key>".
        tied: Name of a tensor that is not written -> the one that stands for it.
        single_file: The target is one file (the only planned one), not a directory.
        subdirectory: What appears at once is this directory in the target, which may
            exist; empty: the target itself.
        notes: What a person should know about the result.
        rewritten: Keys of the state that the result holds in another form; a note says
            how.
        publish: Puts the whole working directory (its argument) in its place instead
            of a plain rename to the second argument.
        hashes: ``finish`` is given the entries of files; else of none, and the files
            are not hashed, only the tensors.
    """

    files: Sequence[PlannedFile]
    finish: Callable[[Path, Mapping[str, FileEntry]], None]
    ignored: Sequence[Ignored] = ()
    tied: Mapping[str, str] = {}
    single_file: bool = False
    subdirectory: str = ""
    notes: Sequence[str] = ()
    rewritten: Sequence[str] = ()
    publish: Callable[[Path, Path], None] | None = None
    hashes: bool = False


class Sink(Protocol):
    """A format that can be written."""

    @property
    def format(self) -> str:
        """Its name in the registry."""
        ...

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """Return what would be written; reads no element.

        Raises:
            ConfigError: the format cannot hold the bundle.
        """
        ...
