"""Checksums that a foreign format has of byte ranges, checked before a byte is used.

ZIP archives have a CRC32 of each entry, which torch writes and never checks. It finds
damage, not forgery.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from threading import Lock

import msgspec

from fabric.core.errors import IntegrityError

WINDOW_BYTES = 1 << 20


class Checksum(msgspec.Struct, frozen=True):
    """The CRC32 of bytes ``begin <= at < begin + size`` of a file."""

    file: str
    begin: int
    size: int
    crc32: int


class Checksums:
    """Ranges and which of them were found whole; shared by threads.

    Args:
        known: Ranges that do not overlap.
    """

    def __init__(self, known: Sequence[Checksum]) -> None:
        self._ranges: dict[str, list[Checksum]] = defaultdict(list)
        for each in sorted(known, key=lambda each: each.begin):
            self._ranges[each.file].append(each)
        self._locks = {file: Lock() for file in self._ranges}
        self._whole: set[Checksum] = set()

    def check(
        self, file: str, at: int, read: Callable[[str, int, memoryview], None]
    ) -> None:
        """Pass if the range that holds byte ``at`` is whole, or there is none.

        The first time the range is read to its end; what is read next comes from the
        page cache.

        Raises:
            IntegrityError: it is damaged (``E_CHECKSUM``).
        """
        ranges = self._ranges.get(file)
        if ranges is None:
            return
        place = bisect_right(ranges, at, key=lambda each: each.begin) - 1
        if place < 0 or at >= ranges[place].begin + ranges[place].size:
            return
        found = ranges[place]
        if found in self._whole:
            return
        with self._locks[file]:
            if found not in self._whole:
                _verify(found, read)
                self._whole.add(found)


def _verify(known: Checksum, read: Callable[[str, int, memoryview], None]) -> None:
    buffer = memoryview(bytearray(min(WINDOW_BYTES, known.size)))
    crc = 0
    for at in range(0, known.size, WINDOW_BYTES):
        view = buffer[: known.size - at]
        read(known.file, known.begin + at, view)
        crc = zlib.crc32(view, crc)
    if crc != known.crc32:
        raise IntegrityError(
            f"{known.file}: bytes {known.begin}..{known.begin + known.size} have the "
            f"CRC32 {crc:08x}, not {known.crc32:08x}",
            code="E_CHECKSUM",
            next_step="the file was changed after it was written: use another copy",
        )
