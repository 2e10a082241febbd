"""The canonical format among the others: our own checkpoints, read and written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from checkpoints.boxes import Box, whole
from checkpoints.directories import LATEST_NAME, sync_directory, write_synced
from checkpoints.dtypes import tensor_bytes
from checkpoints.formats.sink import Bundle, OutTensor, Plan, PlannedFile, SinkOptions
from checkpoints.formats.source import Source
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
    root_of,
)
from checkpoints.manifest_checks import check_manifest, check_tensor_name
from checkpoints.parts import chunk_key
from checkpoints.reader import CheckpointReader
from checkpoints.safetensors_io import NewTensor, layout
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError, LocalProtocolError

MAX_FILE_BYTES = 512 << 20
"""Several files are written and read side by side; more would be many small ones."""


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a step, or has a ``latest`` that names one."""
    if (path / MANIFEST_NAME).is_file():
        return True
    latest = path / LATEST_NAME
    return latest.is_file() and latest.read_bytes()[:5] == b"step-"


def open_source(path: Path) -> Source:
    """Open a step; see :class:`checkpoints.reader.CheckpointReader`."""
    return CheckpointReader(path)


class _Part(msgspec.Struct, frozen=True):
    """A box of a tensor that is to be written."""

    tensor: OutTensor
    box: Box

    @property
    def size(self) -> int:
        return tensor_bytes(self.tensor.dtype, self.box.sizes)

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return chunk_key(self.tensor.name, self.tensor.shape, self.box)

    def read(self) -> Iterator[Buffer]:
        """Yield its bytes."""
        if self.box == whole(self.tensor.shape):
            yield from self.tensor.read()
        elif self.tensor.read_box is not None:
            yield from self.tensor.read_box(self.box)
        else:
            raise LocalProtocolError(f"{self.tensor.name!r} cannot be read in boxes")


class CanonicalSink:
    """Writes ``<target>/step-<n>``."""

    format = "canonical"
    takes_cut = True

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """See :class:`checkpoints.formats.sink.Sink`."""
        for name in [*bundle.tensors, *bundle.aliases]:
            check_tensor_name(name)
        limit = min(options.max_shard_bytes, MAX_FILE_BYTES)
        files: list[PlannedFile] = []
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for writer, parts in sorted(_dealt(bundle, options).items()):
            for number, group in enumerate(_groups(parts, limit)):
                path = f"{writer}-{number}.safetensors"
                files.append(_planned(path, group, chunks))
        step = f"step-{options.step}"
        return Plan(
            files=files,
            finish=partial(_finish, bundle, options, chunks),
            subdirectory=step,
            publish=partial(_publish, options.step),
            hashes=True,
        )


SINK = CanonicalSink()


def _dealt(bundle: Bundle, options: SinkOptions) -> dict[str, list[_Part]]:
    """Return what each writer writes."""
    dealt: dict[str, list[_Part]] = defaultdict(list)
    for name, tensor in bundle.tensors.items():
        if options.cut is None:
            dealt["convert"].append(_Part(tensor, whole(tensor.shape)))
            continue
        for rank, box in options.cut.shares(name, tensor.shape):
            dealt[f"rank{rank}"].append(_Part(tensor, box))
    return dealt


def _groups(parts: Sequence[_Part], limit: int) -> Iterator[list[_Part]]:
    """Cut parts, in name order, into files; a part is never cut."""
    group: list[_Part] = []
    used = 0
    for part in sorted(parts, key=lambda each: (each.tensor.name, each.box)):
        if group and used + part.size > limit:
            yield group
            group, used = [], 0
        group.append(part)
        used += part.size
    if group:
        yield group


def _planned(
    path: str, group: Sequence[_Part], chunks: dict[str, list[Chunk]]
) -> PlannedFile:
    """Return one file, and add its chunks to ``chunks``."""
    by_key = {part.key: part for part in group}
    new = [NewTensor(p.key, p.tensor.dtype, p.box.sizes) for p in group]
    prefix, order, header = layout(new, {"format": "pt"})
    ordered = [by_key[each.name] for each in order]
    for part in ordered:
        begin, end = header.tensors[part.key].data_offsets
        at = header.data_begin
        if part.box.volume:
            chunk = Chunk(part.box.offsets, part.box.sizes, path, at + begin, at + end)
            chunks[part.tensor.name].append(chunk)

    def stream() -> Iterator[Buffer]:
        yield prefix
        for part in ordered:
            yield from part.read()

    return PlannedFile(
        path,
        tuple(part.tensor.name for part in ordered),
        len(prefix) + sum(part.size for part in ordered),
        stream,
    )


def _finish(
    bundle: Bundle,
    options: SinkOptions,
    chunks: Mapping[str, Sequence[Chunk]],
    directory: Path,
    entries: Mapping[str, FileEntry],
) -> None:
    """Write the manifest, last."""
    cut = options.cut
    manifest = Manifest(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        step=options.step,
        tensors={
            name: TensorEntry(
                tensor.dtype,
                tensor.shape,
                tuple(sorted(chunks.get(name, ()), key=lambda chunk: chunk.box)),
            )
            for name, tensor in bundle.tensors.items()
        },
        files=dict(entries),
        aliases=dict(bundle.aliases),
        state=dict(bundle.state),
        layout={"layout": cut.layout, "world": cut.world} if cut else {},
        parent=options.parent,
    )
    check_manifest(manifest)
    try:
        data = encode_manifest(manifest)
    except ValueError as exc:
        raise ConfigError(
            f"the state has no canonical form: {exc}",
            code="E_STATE",
            next_step="the source holds a value that JSON has no exact form for",
        ) from exc
    write_synced(directory / MANIFEST_NAME, data)
    sync_directory(directory)


def _publish(step: int, work: Path, final: Path) -> None:
    """Rename the step into place as a save does."""
    root = root_of((work / MANIFEST_NAME).read_bytes())
    writer = CheckpointWriter(final.parent, step)
    assert (writer.temporary, writer.path) == (work, final)
    writer.publish(root)
