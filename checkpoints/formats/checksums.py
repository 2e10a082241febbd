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
        if (found := self.unchecked(file, at)) is not None:
            self._check(found, read)

    def unchecked(self, file: str, at: int) -> Checksum | None:
        """Return the range that holds byte ``at``, if it was not found whole yet."""
        ranges = self._ranges.get(file)
        if ranges is None:
            return None
        place = bisect_right(ranges, at, key=lambda each: each.begin) - 1
        if place < 0 or at >= ranges[place].begin + ranges[place].size:
            return None
        return None if ranges[place] in self._whole else ranges[place]

    def _check(
        self, found: Checksum, read: Callable[[str, int, memoryview], None]
    ) -> None:
        with self._locks[found.file]:
            if found not in self._whole:
                _verify(found, read)
                self._whole.add(found)

    def stream(self, read: Callable[[str, int, memoryview], None]) -> Stream:
        """Return a check of ranges while they are read in order, to their end."""
        return Stream(self, read)

    def passed(self, known: Checksum, crc: int) -> None:
        """Take the CRC32 of all of a range.

        Raises:
            IntegrityError: it is damaged.
        """
        _compare(known, crc)
        self._whole.add(known)


class Stream:
    """One pass over ranges: what is read in order from their begin is not read twice.

    Bytes are handed on before their range was read to its end, so whoever takes them
    keeps nothing until :meth:`finish` returned.

    Args:
        checksums: Says which ranges there are, and remembers those found whole.
        read: Reads bytes of a file.
    """

    def __init__(
        self, checksums: Checksums, read: Callable[[str, int, memoryview], None]
    ) -> None:
        self._checksums, self._read = checksums, read
        self._begun: dict[Checksum, tuple[int, int]] = {}
        """Bytes of the range that passed, and their CRC32."""

    def feed(self, file: str, at: int, data: memoryview) -> None:
        """``data`` was read from byte ``at`` on.

        Raises:
            IntegrityError: the range that it is of is damaged.
        """
        known = self._checksums.unchecked(file, at)
        if known is None:
            return
        passed, crc = self._begun.pop(known, (0, 0))
        if at != known.begin + passed or passed + len(data) > known.size:
            self._checksums.check(file, at, self._read)
            return
        passed, crc = passed + len(data), zlib.crc32(data, crc)
        if passed == known.size:
            self._checksums.passed(known, crc)
        else:
            self._begun[known] = (passed, crc)

    def finish(self) -> None:
        """Check what was not read to its end.

        Raises:
            IntegrityError: it is damaged.
        """
        for known in self._begun:
            self._checksums.check(known.file, known.begin, self._read)
        self._begun.clear()


def _verify(known: Checksum, read: Callable[[str, int, memoryview], None]) -> None:
    buffer = memoryview(bytearray(min(WINDOW_BYTES, known.size)))
    crc = 0
    for at in range(0, known.size, WINDOW_BYTES):
        view = buffer[: known.size - at]
        read(known.file, known.begin + at, view)
        crc = zlib.crc32(view, crc)
    _compare(known, crc)


def _compare(known: Checksum, crc: int) -> None:
    if crc != known.crc32:
        raise IntegrityError(
            f"{known.file}: bytes {known.begin}..{known.begin + known.size} have the "
            f"CRC32 {crc:08x}, not {known.crc32:08x}",
            code="E_CHECKSUM",
            next_step="the file was changed after it was written: use another copy",
        )
