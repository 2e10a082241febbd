"""Files of safetensors that hold whole tensors: read as extents, or planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from checkpoints.boxes import whole
from checkpoints.directories import disk_errors
from checkpoints.formats.extent_source import Extent, StoredTensor, open_regular
from checkpoints.formats.sink import OutTensor, PlannedFile
from checkpoints.hashed_file import Buffer
from checkpoints.safetensors_io import Header, NewTensor, layout, read_header_untrusted


class StoredFile(msgspec.Struct, frozen=True):
    """The tensors of one file, by their names in it, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_file_untrusted(base: Path, name: str) -> StoredFile:
    """Return what a safetensors file says it holds.

    Raises:
        IntegrityError: missing, damaged or hostile.
    """
    fd = open_regular(base, name)
    with disk_errors(base / name), open(fd, "rb") as file:
        header: Header = read_header_untrusted(file)
    tensors = {}
    for key, entry in header.tensors.items():
        box = whole(entry.shape)
        begin = header.data_begin + entry.data_offsets[0]
        extents = (Extent(box, name, begin),) if box.volume else ()
        tensors[key] = StoredTensor(entry.dtype, entry.shape, extents)
    return StoredFile(tensors, header.metadata)


def plan_file(
    path: str,
    tensors: Mapping[str, OutTensor],
    metadata: Mapping[str, str],
    canonical: Callable[[str], str],
) -> PlannedFile:
    """Return a file that holds ``tensors`` under the names that are the keys.

    Args:
        path: Of the file.
        tensors: Name in the file -> tensor.
        metadata: The file's free text.
        canonical: Returns the canonical name of a name in the file.
    """
    new = [NewTensor(key, each.dtype, each.shape) for key, each in tensors.items()]
    prefix, order, _ = layout(new, metadata)
    reads: list[Callable[[], Iterable[Buffer]]] = [
        tensors[each.name].read for each in order
    ]

    def stream() -> Iterator[Buffer]:
        yield prefix
        for read in reads:
            yield from read()

    return PlannedFile(
        path,
        tuple(map(canonical, tensors)),
        len(prefix) + sum(each.size_bytes for each in tensors.values()),
        stream,
    )


def cut_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return names in order, cut into groups above ``max_bytes``; one at least."""
    groups: list[list[str]] = [[]]
    used = 0
    for name in sorted(sizes):
        if groups[-1] and used + sizes[name] > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += sizes[name]
    return groups


def shard_names(groups: Sequence[object], stem: str) -> list[str]:
    """Return the file names that transformers gives to so many shards."""
    if len(groups) == 1:
        return [f"{stem}.safetensors"]
    count = len(groups)
    return [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
