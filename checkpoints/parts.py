"""What one writer contributes to a checkpoint: files of chunks, and their record.

Several writers (threads, processes, hosts with one file system) each call
:func:`write_part` into the step's temporary directory; one of them merges the records
and commits (``checkpoints.writer``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from checkpoints.boxes import Box, inside, whole
from checkpoints.directories import disk_errors
from checkpoints.dtypes import tensor_bytes
from checkpoints.hashed_file import Buffer, HashedFile
from checkpoints.manifest import Chunk, FileEntry, FileName, Name, TensorEntry
from checkpoints.safetensors_io import NewTensor, layout
from fabric.core.codec import Codec

MAX_FILE_BYTES = 4 << 30
"""A writer starts another file above this, so that files stay easy to move."""
WINDOW_BYTES = 8 << 20
"""Bytes of a tensor held in memory at a time while streaming."""

_WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

Hook = Callable[[str], None]
"""Told the name of each point of a save; tests kill the process there."""


def no_hook(point: str) -> None:
    """Do nothing."""


def chunk_key(name: str, shape: Sequence[int], box: Box) -> str:
    """Return the name of a chunk in its safetensors file: a part says where it lies."""
    if box == whole(shape):
        return name
    return f"{name}@{','.join(map(str, box.offsets))}"


class ChunkSource(msgspec.Struct, frozen=True):
    """A box of a tensor, and where its bytes come from.

    Attributes:
        name: The tensor's full name.
        dtype: Element type, safetensors name.
        shape: Global shape.
        box: The part this source holds.
        read: Returns the box's bytes, row-major and little-endian, in buffers of any
            size that stay valid until the next one is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    read: Callable[[], Iterable[Buffer]]

    @property
    def size(self) -> int:
        """Bytes of the box."""
        return tensor_bytes(self.dtype, self.box.sizes)

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return chunk_key(self.name, self.shape, self.box)


class WriterPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record of one writer: its files, and the chunks in them."""

    writer: Annotated[str, msgspec.Meta(max_length=100)]
    files: dict[FileName, FileEntry]
    tensors: dict[Name, TensorEntry]


PART_CODEC: Codec[WriterPart] = Codec(WriterPart, max_bytes=64 << 20)
"""For writers that hand their record to the committer over a wire."""


def bytes_source(
    name: str,
    dtype: str,
    shape: Sequence[int],
    data: Buffer,
    box: Box | None = None,
) -> ChunkSource:
    """Return a source for ``box`` (default: the whole tensor) held in memory."""
    return ChunkSource(
        name, dtype, tuple(shape), box or whole(shape), lambda: iter((data,))
    )


def write_part(
    directory: Path,
    writer: str,
    sources: Sequence[ChunkSource],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_point: Hook = no_hook,
) -> WriterPart:
    """Write ``sources`` into files ``<writer>-<k>.safetensors``, and sync them.

    Args:
        directory: The step's temporary directory.
        writer: Letters, digits, "-" and "_": unique among the step's writers.
        sources: Each box of each tensor held by exactly one writer.
        max_file_bytes: Start another file above this; a chunk is never cut.
        on_point: See :data:`Hook`.

    Raises:
        ResourceExhausted: the disk is full.
        ConfigError: another error of the file system.
        ValueError: a bad argument, or a source with too few or too many bytes.
    """
    if not _WRITER.fullmatch(writer):
        raise ValueError(f"writer name {writer!r}")
    for source in sources:
        if not inside(source.box, source.shape):
            raise ValueError(f"{source.name!r}: {source.box} outside {source.shape}")
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    with disk_errors(directory):
        for number, group in enumerate(_groups(sources, max_file_bytes)):
            name = f"{writer}-{number}.safetensors"
            files[name] = _write_file(directory / name, group, tensors, on_point)
    return WriterPart(writer, files, tensors)


def _groups(
    sources: Sequence[ChunkSource], max_bytes: int
) -> Iterator[list[ChunkSource]]:
    """Cut the sources, in name order, into files."""
    group: list[ChunkSource] = []
    total = 0
    for source in sorted(sources, key=lambda each: (each.name, each.box)):
        if group and total + source.size > max_bytes:
            yield group
            group, total = [], 0
        group.append(source)
        total += source.size
    if group:
        yield group


def _write_file(
    path: Path,
    group: Sequence[ChunkSource],
    tensors: dict[str, TensorEntry],
    on_point: Hook,
) -> FileEntry:
    """Write one file and add its chunks to ``tensors``."""
    by_key = {source.key: source for source in group}
    wanted = [NewTensor(s.key, s.dtype, s.box.sizes) for s in group]
    prefix, order, header = layout(wanted, {"format": "pt"})
    on_point("file.create")
    with HashedFile(path) as file:
        on_point("file.created")
        file.write(prefix)
        for tensor in order:
            source = by_key[tensor.name]
            for window in source.read():
                file.write(window)
            begin, end = (
                header.data_begin + at
                for at in header.tensors[tensor.name].data_offsets
            )
            if file.size != end:
                raise ValueError(
                    f"{source.key!r}: {file.size - begin} B, not {source.size}"
                )
            _add_chunk(tensors, source, path.name, begin)
        on_point("file.written")
        entry = file.finish()
    on_point("file.synced")
    return entry


def _add_chunk(
    tensors: dict[str, TensorEntry], source: ChunkSource, file: str, begin: int
) -> None:
    known = tensors.get(source.name)
    entry = TensorEntry(source.dtype, source.shape, ())
    if known is not None and (known.dtype, known.shape) != (entry.dtype, entry.shape):
        raise ValueError(f"{source.name!r}: two types or shapes in one part")
    chunks = known.chunks if known else ()
    if source.box.volume:
        end = begin + source.size
        chunks += (Chunk(source.box.offsets, source.box.sizes, file, begin, end),)
    tensors[source.name] = TensorEntry(source.dtype, source.shape, chunks)
