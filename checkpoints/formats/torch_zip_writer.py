"""Write archives as ``torch.save`` does, with bytes that are not in memory.

Where each entry lies is known before its bytes are: sizes are. Checksums are not, so
they follow each entry (a data descriptor), as torch itself writes them. Archives above
4 GiB, entries above 4 GiB and more than 65,534 entries use the 64-bit fields.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from checkpoints.boxes import strides_of
from checkpoints.dtypes import item_bytes
from checkpoints.formats.pickle_values import (
    STORAGES,
    TORCH_NAMES,
    UNTYPED,
    Global,
    StorageRef,
    TensorRef,
)
from checkpoints.formats.pickle_writer import Call, Persistent, pickled
from checkpoints.hashed_file import Buffer
from fabric.core.errors import ConfigError

ALIGNMENT = 64
"""Of each entry's bytes, as torch aligns them: so that they can be memory-mapped."""
MAX_PICKLE_BYTES = 1 << 30

_ROOT = "archive"
_FLAGS = 0x0808  # names are UTF-8, checksum and sizes follow the bytes
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


class NewEntry(msgspec.Struct, frozen=True):
    """An entry to be written: its name, bytes, and how to read them."""

    name: str
    size: int
    read: Callable[[], Iterable[Buffer]]


class _Placed(msgspec.Struct, frozen=True):
    entry: NewEntry
    at: int
    header: bytes

    @property
    def wide(self) -> bool:
        return self.entry.size >= _FULL_32

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.at + len(self.header) + self.entry.size + (24 if self.wide else 16)


class NewArchive:
    """An archive to be written.

    Args:
        value: What ``torch.load`` returns: see :func:`pickled`, with tensors as
            :func:`tensor_call` gives them.
        storages: Each with its key as name.

    Attributes:
        size: Its bytes.
    """

    def __init__(self, value: object, storages: Sequence[NewEntry]) -> None:
        program = pickled(value)
        if len(program) > MAX_PICKLE_BYTES:
            raise ConfigError(
                f"an index of {len(program)} B", next_step="write the canonical format"
            )
        entries = [
            _bytes_entry("data.pkl", program),
            _bytes_entry(".format_version", b"1"),
            _bytes_entry(".storage_alignment", str(ALIGNMENT).encode()),
            _bytes_entry("byteorder", b"little"),
            *(NewEntry(f"data/{each.name}", each.size, each.read) for each in storages),
            _bytes_entry("version", b"3\n"),
        ]
        self._placed: list[_Placed] = []
        at = 0
        for entry in entries:
            placed = _Placed(entry, at, _local_header(entry, at))
            self._placed.append(placed)
            at = placed.end
        self._directory_at = at
        self.size = at + len(self._directory([0] * len(entries)))

    def chunks(self) -> Iterator[Buffer]:
        """Yield its bytes in order, in memory bounded by the entries' own buffers."""
        checksums = []
        for placed in self._placed:
            yield placed.header
            checksum = count = 0
            for data in placed.entry.read():
                checksum = zlib.crc32(data, checksum)
                count += memoryview(data).nbytes
                yield data
            size = placed.entry.size
            if count != size:
                raise ValueError(f"{placed.entry.name!r}: {count} B, not {size}")
            layout = "<4sIQQ" if placed.wide else "<4sIII"
            yield struct.pack(layout, b"PK\x07\x08", checksum, size, size)
            checksums.append(checksum)
        yield self._directory(checksums)

    def _directory(self, checksums: Sequence[int]) -> bytes:
        entries = b"".join(map(_central, self._placed, checksums))
        count, begin = len(self._placed), self._directory_at
        end = begin + len(entries)
        parts = [entries]
        if count >= _FULL_16 or end >= _FULL_32:
            parts += [
                struct.pack("<4sQ2H2I", b"PK\x06\x06", 44, 45, 45, 0, 0),
                struct.pack("<4Q", count, count, len(entries), begin),
                struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1),
            ]
        short = min(count, _FULL_16)
        parts.append(
            struct.pack(
                "<4s4H2IH",
                *(b"PK\x05\x06", 0, 0, short, short),
                *(min(len(entries), _FULL_32), min(begin, _FULL_32), 0),
            )
        )
        return b"".join(parts)


def _bytes_entry(name: str, data: bytes) -> NewEntry:
    return NewEntry(name, len(data), lambda: (data,))


def _local_header(entry: NewEntry, at: int) -> bytes:
    """Return the header at ``at``, padded so that the entry's bytes are aligned."""
    name = f"{_ROOT}/{entry.name}".encode()
    wide = entry.size >= _FULL_32
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if wide else b""
    padding = -(at + 30 + len(name) + len(extra) + 4) % ALIGNMENT
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = _FULL_32 if wide else 0
    fields = (b"PK\x03\x04", 45 if wide else 20, _FLAGS, 0, 0, 0, 0, size, size)
    header = struct.pack("<4s5H3I2H", *fields, len(name), len(extra))
    return header + name + extra


def _central(placed: _Placed, checksum: int) -> bytes:
    name = f"{_ROOT}/{placed.entry.name}".encode()
    size, at = placed.entry.size, placed.at
    wide = [each for each in (size, size, at) if each >= _FULL_32]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    short, version = min(size, _FULL_32), 45 if wide else 20
    header = struct.pack(
        "<4s6H3I5H2I",
        *(b"PK\x01\x02", version, version, _FLAGS, 0, 0, 0),
        *(checksum, short, short),
        *(len(name), len(extra), 0, 0, 0),
        *(0, min(at, _FULL_32)),
    )
    return header + name + extra


def tensor_call(tensor: TensorRef) -> Call:
    """Return what makes torch rebuild ``tensor``."""
    storage, count = tensor.storage, tensor.storage.size
    name = _STORAGE_NAMES.get(tensor.dtype)
    kind = UNTYPED
    if name is not None:
        kind, count = Global("torch", name), count // item_bytes(tensor.dtype)
    identity = Persistent(("storage", kind, storage.key, "cpu", count))
    hooks = Call(Global("collections", "OrderedDict"), ())
    args = (identity, tensor.offset, tensor.shape, tensor.strides, False, hooks)
    if name is not None:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)
    dtype = Global("torch", TORCH_NAMES[tensor.dtype])
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), (*args, dtype))


def whole_tensor(key: str, dtype: str, shape: tuple[int, ...], size: int) -> TensorRef:
    """Return a dense tensor that has a storage of its own."""
    return TensorRef(StorageRef(dtype, key, size), dtype, 0, shape, strides_of(shape))
