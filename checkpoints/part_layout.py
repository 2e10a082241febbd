"""Where a writer's chunks will lie in its files, known before a byte is copied.

A save that stages its bytes lays them out in memory as they will lie on the disk, so
that a file is written from one piece of memory. Chunks that are not expected to change
(a frozen backbone) go into files of their own, which the next step can share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from checkpoints.boxes import Box
from checkpoints.dtypes import tensor_bytes
from checkpoints.manifest import Chunk, FileEntry, TensorEntry
from checkpoints.parts import MAX_FILE_BYTES, WriterPart, chunk_key
from checkpoints.safetensors_io import NewTensor, layout

PAGE_BYTES = 4096
"""What unbuffered writes are aligned to, in memory and in the file."""


class ChunkPlan(NamedTuple):
    """A chunk to be written: a box of a tensor of global ``shape``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def size(self) -> int:
        """Bytes of the box."""
        return tensor_bytes(self.dtype, self.box.sizes)


class PlacedChunk(NamedTuple):
    """A chunk and the bytes of the file it will have."""

    plan: ChunkPlan
    begin: int
    end: int


class FileLayout(NamedTuple):
    """One file: its name, header, chunks and size."""

    name: str
    prefix: bytes
    chunks: tuple[PlacedChunk, ...]
    size: int


def plan_files(
    writer: str,
    chunks: Iterable[ChunkPlan],
    *,
    frozen: Collection[str] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[FileLayout]:
    """Return the files of one writer; the same arguments give the same files.

    Args:
        writer: Unique among the step's writers: letters, digits, "-", "_".
        chunks: None of them empty.
        frozen: Names of tensors that are not expected to change.
        max_file_bytes: Start another file above this; a chunk is never cut.
    """
    still = set(frozen)
    groups: dict[str, list[ChunkPlan]] = {writer: [], f"{writer}-frozen": []}
    for chunk in sorted(chunks, key=lambda each: (each.name, each.box)):
        groups[f"{writer}-frozen" if chunk.name in still else writer].append(chunk)
    return [
        _file(f"{stem}-{number}.safetensors", group)
        for stem, members in groups.items()
        for number, group in enumerate(_cut(members, max_file_bytes))
    ]


def _cut(chunks: Sequence[ChunkPlan], max_bytes: int) -> list[list[ChunkPlan]]:
    groups: list[list[ChunkPlan]] = []
    total = 0
    for chunk in chunks:
        if not groups or total + chunk.size > max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(chunk)
        total += chunk.size
    return groups


def _file(name: str, group: Sequence[ChunkPlan]) -> FileLayout:
    by_key = {chunk_key(c.name, c.shape, c.box): c for c in group}
    wanted = [NewTensor(key, c.dtype, c.box.sizes) for key, c in by_key.items()]
    prefix, order, header = layout(wanted, {"format": "pt"})
    placed = []
    for tensor in order:
        begin, end = header.tensors[tensor.name].data_offsets
        at = header.data_begin
        placed.append(PlacedChunk(by_key[tensor.name], at + begin, at + end))
    return FileLayout(name, prefix, tuple(placed), placed[-1].end)


def part_record(
    writer: str, layouts: Iterable[FileLayout], files: Mapping[str, FileEntry]
) -> WriterPart:
    """Return the record of a writer whose files are written."""
    tensors: dict[str, TensorEntry] = {}
    for file in layouts:
        for plan, begin, end in file.chunks:
            known = tensors.get(plan.name)
            chunks = known.chunks if known else ()
            chunk = Chunk(plan.box.offsets, plan.box.sizes, file.name, begin, end)
            tensors[plan.name] = TensorEntry(plan.dtype, plan.shape, (*chunks, chunk))
    return WriterPart(writer, dict(files), tensors)
