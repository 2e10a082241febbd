"""The archives that ``torch.save`` writes, as an index of where elements lie.

An archive is a ZIP: ``<name>/data.pkl`` is a pickle that refers to storages, and
``<name>/data/<key>`` holds the bytes of one. Its entries are stored, never deflated, so
that each storage is a byte range of the file; an archive can itself be a range of a
file (torch's distributed checkpoints put one after another).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec

from checkpoints.boxes import strides_of, whole
from checkpoints.dtypes import item_bytes
from checkpoints.formats.checksums import Checksum
from checkpoints.formats.extent_source import Extent, StoredTensor, open_regular
from checkpoints.formats.pickle_values import TensorRef
from checkpoints.formats.unpickle import LIMITS, unpickle_untrusted
from fabric.core.errors import IntegrityError

MAX_ENTRIES = 1 << 20
"""Storages of one archive; torch writes one for each tensor."""
SMALL_PROGRAM_BYTES = 1 << 10
"""Archives of one tensor have a few hundred, the same for equal types and shapes."""
MAX_DIRECTORY_BYTES = 128 << 20

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_TAIL = _LOCATOR_64.size + _END.size
_ENCRYPTED = 1
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_FETCH = "the file is damaged: fetch it again, or use another copy"


class Span(msgspec.Struct, frozen=True):
    """Bytes ``begin <= at < begin + size`` of a file, open for reading."""

    fd: int
    file: str
    begin: int
    size: int

    def read(self, at: int, count: int) -> bytes:
        """Return ``count`` bytes from ``at``, counted from ``begin``.

        Raises:
            IntegrityError: they are not all inside.
        """
        if at < 0 or count < 0 or at + count > self.size:
            raise self.refuse(f"bytes {at}..{at + count} of an archive of {self.size}")
        data = os.pread(self.fd, count, self.begin + at)
        if len(data) != count:
            raise self.refuse(f"it ends before byte {self.begin + at + count}")
        return data

    def refuse(self, reason: str, next_step: str = _FETCH) -> IntegrityError:
        """Return the error of an archive that is not read."""
        return IntegrityError(
            f"{self.file}: {reason}", code="E_ARCHIVE", next_step=next_step
        )


class _Entry(NamedTuple):
    """An entry's bytes, counted from the archive's; a CRC32 of 0 says there is none."""

    begin: int
    size: int
    crc32: int


class Archive(msgspec.Struct, frozen=True):
    """An archive's content.

    Attributes:
        file: Where it lies, relative to the checkpoint's directory.
        value: What was saved, made of inert values.
        storages: Key -> first byte in the file, and size.
        checksums: Of the storages; none if torch was told to write none.
    """

    file: str
    value: object
    storages: Mapping[str, tuple[int, int]]
    checksums: tuple[Checksum, ...]

    def stored(self, tensor: TensorRef) -> StoredTensor:
        """Return where the elements of ``tensor`` lie.

        Raises:
            IntegrityError: its storage is missing, or not as large as it was said.
        """
        begin, size = self.storages.get(tensor.storage.key, (0, -1))
        empty = 0 in tensor.shape
        if size != tensor.storage.size and not (empty and size <= 0):
            raise IntegrityError(
                f"{self.file}: storage {tensor.storage.key[:40]!r} has {size} B, "
                f"and {tensor.storage.size} B in the index",
                code="E_SIZE",
                next_step=_FETCH,
            )
        if empty:
            return StoredTensor(tensor.dtype, tensor.shape, ())
        begin += tensor.offset * item_bytes(tensor.dtype)
        dense = tensor.strides == strides_of(tensor.shape)
        strides = None if dense else tensor.strides
        extent = Extent(whole(tensor.shape), self.file, begin, strides)
        return StoredTensor(tensor.dtype, tensor.shape, (extent,))


def read_archive(base: Path, file: str, *, modules: tuple[str, ...] = ()) -> Archive:
    """Return the content of a file that is an archive.

    Args:
        base: The checkpoint's directory.
        file: Relative to it.
        modules: See :func:`checkpoints.formats.unpickle.unpickle_untrusted`.

    Raises:
        IntegrityError: it is none (``E_ARCHIVE``), or its pickle is not read.
    """
    fd = open_regular(base, file)
    try:
        span = Span(fd, file, 0, os.fstat(fd).st_size)
        return read_span(span, modules=modules)
    finally:
        os.close(fd)


def read_span(span: Span, *, modules: tuple[str, ...] = ()) -> Archive:
    """Return the content of an archive that is a part of a file; see above."""
    begin = span.read(0, min(4, span.size))
    if begin != b"PK\x03\x04":
        raise _no_archive(span, begin)
    entries = dict(_entries(span))
    root = next((n[:-9] for n in entries if n.endswith("/data.pkl")), None)
    if root is None or "/" in root:
        raise span.refuse("no data.pkl in it", "it was not written by torch.save")
    if f"{root}/constants.pkl" in entries:
        raise span.refuse("a TorchScript program", "save the state_dict of its module")
    order = _content(span, entries, f"{root}/byteorder", 16) or b"little"
    if order.strip() != b"little":
        raise span.refuse(
            f"byte order {order!r}", "save it again on a little-endian machine"
        )
    program = _content(span, entries, f"{root}/data.pkl", LIMITS.max_bytes)
    prefix = f"{root}/data/"
    data = {
        name[len(prefix) :]: entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    return Archive(
        span.file,
        _read_program(program or b"", modules),
        {key: (span.begin + each.begin, each.size) for key, each in data.items()},
        tuple(
            Checksum(span.file, span.begin + each.begin, each.size, each.crc32)
            for each in data.values()
            if each.crc32
        ),
    )


def _read_program(program: bytes, modules: tuple[str, ...]) -> object:
    if len(program) > SMALL_PROGRAM_BYTES:
        return unpickle_untrusted(program, modules=modules)
    value = _known_program(program, modules)
    # only what nobody can change is given out twice
    if isinstance(value, TensorRef):
        return value
    return unpickle_untrusted(program, modules=modules)


@lru_cache(maxsize=1024)
def _known_program(program: bytes, modules: tuple[str, ...]) -> object:
    return unpickle_untrusted(program, modules=modules)


def _no_archive(span: Span, begin: bytes) -> IntegrityError:
    if begin[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        return span.refuse(
            "a bare pickle, as torch wrote before 1.6",
            "load it with torch where you trust it, and torch.save it again",
        )
    return span.refuse("no archive of torch.save")


def _content(
    span: Span, entries: Mapping[str, _Entry], name: str, limit: int
) -> bytes | None:
    if name not in entries:
        return None
    entry = entries[name]
    if entry.size > limit:
        raise span.refuse(f"{name!r} has {entry.size} B, more than {limit}")
    data = span.read(entry.begin, entry.size)
    if entry.crc32 and zlib.crc32(data) != entry.crc32:
        raise span.refuse(f"{name!r} is not what it was: its CRC32 differs")
    return data


def _entries(span: Span) -> Iterator[tuple[str, _Entry]]:
    """Yield each entry by name; none shares bytes with another.

    An archive is smaller than what it is read into only if entries are compressed or
    lie on top of each other: both are refused.
    """
    count, size, begin = _directory(span)
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise span.refuse(f"a directory of {count} entries, {size} B")
    data = span.read(begin, size)
    names: set[str] = set()
    placed: list[tuple[int, int]] = [(begin, begin + size)]
    at = 0
    for _ in range(count):
        name, local, stored, crc32, at = _central(span, data, at)
        if name in names:
            raise span.refuse(f"entry {name[:80]!r} twice")
        names.add(name)
        first = _first_byte(span, local, name)
        span.read(first + stored, 0)  # inside the archive
        placed.append((local, first + stored))
        yield name, _Entry(first, stored, crc32)
    placed.sort()
    for (_, end), (next_begin, _) in pairwise(placed):
        if next_begin < end:
            raise span.refuse("entries that share bytes")


def _directory(span: Span) -> tuple[int, int, int]:
    """Return entries, bytes and first byte of the archive's directory."""
    if span.size < _END.size:
        raise span.refuse("it ends before its directory")
    at = max(0, span.size - _TAIL)
    tail = span.read(at, span.size - at)
    signature, *_, count, size, begin, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        raise span.refuse("it does not end with a directory: cut, or something follows")
    if not (count == _FULL_16 or _FULL_32 in (size, begin)):
        return count, size, begin
    if len(tail) < _TAIL or tail[:4] != b"PK\x06\x07":
        return count, size, begin
    where = _LOCATOR_64.unpack(tail[: _LOCATOR_64.size])[2]
    end = _END_64.unpack(span.read(where, _END_64.size))
    if end[0] != b"PK\x06\x06":
        raise span.refuse("no directory of 64 bits where one belongs")
    return end[7], end[8], end[9]


def _central(span: Span, data: bytes, at: int) -> tuple[str, int, int, int, int]:
    """Return an entry's name, place, size and CRC32, and where the next one begins."""
    if at + _CENTRAL.size > len(data):
        raise span.refuse("its directory ends in the middle of an entry")
    fields = _CENTRAL.unpack_from(data, at)
    flags, method = fields[3], fields[4]
    packed, size, name_length, extra_length, comment = fields[8:13]
    local = fields[16]
    at += _CENTRAL.size
    end = at + name_length + extra_length + comment
    if fields[0] != b"PK\x01\x02" or end > len(data):
        raise span.refuse("its directory is damaged")
    name = data[at : at + name_length].decode("utf-8", "replace")
    extra = data[at + name_length : end - comment]
    wide = _wide(extra)
    if size == _FULL_32:
        size = next(wide, size)
    if packed == _FULL_32:
        packed = next(wide, packed)
    if local == _FULL_32:
        local = next(wide, local)
    if method != 0 or packed != size or flags & _ENCRYPTED:
        raise span.refuse(
            f"entry {name[:80]!r} is compressed",
            "torch.save never compresses: save again",
        )
    return name, local, size, fields[7], end


def _wide(extra: bytes) -> Iterator[int]:
    """Yield the numbers of the ZIP64 field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == 1:
            count = min(length, len(extra) - at) // 8
            yield from struct.unpack_from(f"<{count}Q", extra, at)
            return
        at += length


def _first_byte(span: Span, local: int, name: str) -> int:
    """Return where an entry's bytes begin: after its local header."""
    header = span.read(local, _LOCAL.size)
    signature, _, _, method, *_ = _LOCAL.unpack(header)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    if signature != b"PK\x03\x04" or method != 0:
        raise span.refuse(f"entry {name[:80]!r} is not where the directory says")
    begin = local + _LOCAL.size
    if span.read(begin, name_length).decode("utf-8", "replace") != name:
        raise span.refuse(f"entry {name[:80]!r} has another name in its header")
    first: int = begin + name_length + extra_length
    return first
