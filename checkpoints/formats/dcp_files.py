"""The data files of a torch distributed checkpoint: archives, or safetensors."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path as FilePath

import msgspec

from checkpoints.boxes import Box
from checkpoints.formats.checksums import Checksum
from checkpoints.formats.dcp_index import Chunk, DcpIndex, IndexedTensor, Place
from checkpoints.formats.extent_source import Extent, StoredTensor, open_regular
from checkpoints.formats.pickle_values import TensorRef
from checkpoints.formats.state_leaves import Path, leaves
from checkpoints.formats.torch_zip import Archive, Span, read_span
from checkpoints.safetensors_io import (
    MAX_HEADER_BYTES,
    Header,
    HeaderEntry,
    parse_header_untrusted,
)
from fabric.core.errors import IntegrityError

SHARDING_KEY = "DCP_SHARDING_INFO"
"""In the metadata of safetensors files of torch: name -> offsets of the box."""
MIXED = (
    "files of two saves are mixed, as after a save over an older one that did not "
    "finish: use another copy or step"
)
AGE_SECONDS = 60.0
"""A whole save writes its index last; copies and clocks differ a little."""


class Contents(msgspec.Struct):
    """Where everything lies.

    Attributes:
        tensors: By flat name, aliases too.
        aliases: Flat name -> flat name of the tensor whose bytes it shares.
        objects: Flat name -> leaves of the object, its tensors as stored ones.
        unread: Flat name -> why an object is not read; file -> what is odd about it.
        checksums: Of byte ranges.
    """

    tensors: dict[str, StoredTensor]
    aliases: dict[str, str]
    objects: dict[str, list[tuple[Path, object]]]
    unread: dict[str, str]
    checksums: list[Checksum]


def read_contents(
    base: FilePath, index: DcpIndex, *, modules: tuple[str, ...] = ()
) -> Contents:
    """Find everything that ``index`` lists in the files of ``base``.

    Raises:
        IntegrityError: files and index do not agree.
    """
    items = places_by_file(index)
    contents = Contents({}, {}, {}, {}, [])
    found: dict[Place, Item] = {}
    for file, places in items.items():
        with DataFile(base, file, modules) as opened:
            for place in places:
                found[place] = opened.item(place)
            opened.check_cover(places)
            if opened.written > index.written + AGE_SECONDS:
                contents.unread[file] = (
                    "not left out, but written after the index: unless it was copied, "
                    f"{MIXED}"
                )
    _add_objects(index, found, contents)
    _add_tensors(index, found, contents)
    seen: set[Checksum] = set()
    for item in found.values():
        if isinstance(item, Archive):
            seen.update(item.checksums)
    contents.checksums = list(seen)
    return contents


class _Blob(msgspec.Struct, frozen=True):
    """Safetensors written into a file, perhaps after objects."""

    file: str
    begin: int
    header: Header
    offsets: Mapping[str, tuple[int, ...]]


Item = Archive | _Blob | IntegrityError
"""An object whose pickle is not read is an error that is only told."""


def places_by_file(index: DcpIndex) -> dict[str, list[Place]]:
    """Return each file's places, in order."""
    result: dict[str, set[Place]] = defaultdict(set)
    for place in index.places():
        result[place.file].add(place)
    return {
        file: sorted(places, key=lambda each: (each.offset, each.length))
        for file, places in result.items()
    }


class DataFile:
    """A data file, open."""

    def __init__(self, base: FilePath, file: str, modules: tuple[str, ...]) -> None:
        self._file = file
        self._modules = modules
        self._blob: _Blob | None = None
        self._fd = open_regular(base, file)
        status = os.fstat(self._fd)
        self._size = status.st_size
        self.written = status.st_mtime

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def item(self, place: Place) -> Item:
        """Return what lies at ``place``."""
        self.check_inside(place)
        if self._blob is not None and place.offset == self._blob.begin:
            return self._blob
        span = Span(self._fd, self._file, place.offset, place.length)
        begin = os.pread(self._fd, 4, place.offset)
        if begin != b"PK\x03\x04" and begin[3:] == b"\0":
            self._blob = self._read_blob(place.offset)
            return self._blob
        try:
            return read_span(span, modules=self._modules)
        except IntegrityError as error:
            if error.code == "E_PICKLE":
                return error
            raise

    def check_inside(self, place: Place) -> None:
        """Pass if the file is long enough for ``place``."""
        if place.offset + place.length > self._size:
            raise IntegrityError(
                f"{self._file}: {self._size} B, but something is said to lie at "
                f"{place.offset}..{place.offset + place.length}",
                code="E_SIZE",
                next_step=f"the file was cut, or {MIXED}",
            )

    def check_cover(self, places: Sequence[Place]) -> None:
        """Pass if the places follow each other and fill the file.

        torch's writer leaves no byte between them. One that does is another file.
        """
        if self._blob is not None:
            return
        ends = [(each.offset, each.offset + each.length) for each in places]
        for (_, end), (begin, _) in pairwise([(0, 0), *ends, (self._size, 0)]):
            if begin != end:
                what = "twice" if begin < end else "never"
                raise IntegrityError(
                    f"{self._file}: bytes {min(begin, end)}..{max(begin, end)} are "
                    f"described {what}",
                    code="E_MIXED",
                    next_step=MIXED,
                )

    def _read_blob(self, begin: int) -> _Blob:
        size = int.from_bytes(os.pread(self._fd, 8, begin), "little")
        data = self._size - begin - 8 - size
        if size > MAX_HEADER_BYTES or data < 0:
            raise IntegrityError(
                f"{self._file}: neither archive nor safetensors at byte {begin}",
                code="E_ARCHIVE",
                next_step=MIXED,
            )
        header = parse_header_untrusted(os.pread(self._fd, size, begin + 8), data)
        offsets = dict(shard_offsets(self._file, header))
        return _Blob(self._file, begin, header, offsets)


def shard_offsets(file: str, header: Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield where each tensor of a file of torch's begins in the whole one.

    Raises:
        IntegrityError: the file's metadata does not say it for each.
    """
    try:
        info = json.loads(header.metadata.get(SHARDING_KEY, ""))
        shards = msgspec.convert(info, dict[str, _Shard])
    except (ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise _no_sharding(file) from exc
    for name, entry in header.tensors.items():
        shard = shards.get(name)
        if shard is None or len(shard.saved_offsets) != len(entry.shape):
            raise _no_sharding(file)
        yield name, shard.saved_offsets


class _Shard(msgspec.Struct, frozen=True):
    saved_offsets: tuple[int, ...]


def _no_sharding(file: str) -> IntegrityError:
    return IntegrityError(
        f"{file}: safetensors that do not say where their parts belong",
        code="E_INDEX",
        next_step=MIXED,
    )


def _add_objects(
    index: DcpIndex, found: Mapping[Place, Item], contents: Contents
) -> None:
    for name, place in index.objects.items():
        add_object(name, found[place], contents)


def add_object(name: str, item: Item, contents: Contents) -> None:
    """Add an object, or why it is not read."""
    if isinstance(item, IntegrityError):
        contents.unread[name] = f"an object that is not data: {item.reason}"
    elif isinstance(item, _Blob):
        raise mismatch(name, item.file, "tensors where an object belongs")
    else:
        contents.objects[name] = [
            (path, item.stored(value) if isinstance(value, TensorRef) else value)
            for path, value in leaves(item.value)
        ]


def _add_tensors(
    index: DcpIndex, found: Mapping[Place, Item], contents: Contents
) -> None:
    first: dict[tuple[IndexedTensor, str], str] = {}
    for name in sorted(index.tensors):
        tensor = index.tensors[name]
        extents = tuple(
            extent
            for chunk in tensor.chunks
            if chunk.box.volume
            for extent in _extents(name, tensor, chunk, found[chunk.place])
        )
        contents.tensors[name] = StoredTensor(tensor.dtype, tensor.shape, extents)
        blob = any(isinstance(found[c.place], _Blob) for c in tensor.chunks)
        known = first.setdefault((tensor, name if blob or not extents else ""), name)
        if known != name:
            contents.aliases[name] = known


def _extents(
    name: str, tensor: IndexedTensor, chunk: Chunk, item: Item
) -> Sequence[Extent]:
    """Return where a chunk lies, in the whole tensor's coordinates."""
    if isinstance(item, IntegrityError):
        raise item
    if isinstance(item, _Blob):
        stored = _in_blob(name, chunk, item)
    else:
        if not isinstance(item.value, TensorRef):
            raise mismatch(name, item.file, "no tensor where one belongs")
        stored = item.stored(item.value)
    if (stored.dtype, stored.shape) != (tensor.dtype, chunk.box.sizes):
        raise mismatch(
            name,
            chunk.place.file,
            f"{stored.dtype} {list(stored.shape)}, and {tensor.dtype} "
            f"{list(chunk.box.sizes)} in the index",
        )
    return [
        Extent(chunk.box, extent.file, extent.begin, extent.strides)
        for extent in stored.extents
    ]


def _in_blob(name: str, chunk: Chunk, blob: _Blob) -> StoredTensor:
    entry: HeaderEntry | None = blob.header.tensors.get(name)
    if entry is None or blob.offsets[name] != chunk.box.offsets:
        # of two boxes of one tensor, torch's writer keeps the last in a file
        raise IntegrityError(
            f"{blob.file}: no part of {name[:80]!r} at {list(chunk.box.offsets)}",
            code="E_GAP",
            next_step="save it again as archives (torch's default)",
        )
    begin = blob.begin + blob.header.data_begin + entry.data_offsets[0]
    box = Box((0,) * len(entry.shape), entry.shape)
    return StoredTensor(entry.dtype, entry.shape, (Extent(box, blob.file, begin),))


def mismatch(name: str, file: str, reason: str) -> IntegrityError:
    """Return the error of a file that is not what the index says."""
    return IntegrityError(
        f"{file}: {name[:80]!r}: {reason}", code="E_MIXED", next_step=MIXED
    )
