"""A file that is hashed while it is written; long zeros become holes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from checkpoints.manifest import FileEntry
from fabric.core.digest import BLOCK_BYTES

Buffer = bytes | bytearray | memoryview

WRITE_BYTES = 4 << 20
"""One write call: four blocks, still in the CPU's cache when they are hashed."""
_ZEROS = bytes(WRITE_BYTES)
_MIN_HOLE_BYTES = 64 << 10
"""Shorter zeros are written: a seek is no cheaper."""


class HashedFile:
    """A new file; :meth:`finish` returns its entry once its bytes are on the disk.

    Args:
        path: Of the file.
        hashed: Whether its hashes are wanted; :meth:`finish` returns none otherwise.
    """

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o644)
        self._whole = blake3()
        self._block = blake3()
        self._blocks: list[str] = []
        self._ends_in_hole = False
        self._hashed = hashed
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def write(self, data: Buffer) -> None:
        """Append ``data``, hashing it on the way."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), WRITE_BYTES):
            part = view[at : at + WRITE_BYTES]
            if self._hashed:
                self._hash(part)
            else:
                self.size += len(part)
            if is_zero(part):
                os.lseek(self._fd, len(part), os.SEEK_CUR)
                self._ends_in_hole = True
                continue
            self._ends_in_hole = False
            while part:
                part = part[os.write(self._fd, part) :]

    def finish(self) -> FileEntry:
        """Flush to the disk and return size and hashes."""
        if self._hashed and self.size % BLOCK_BYTES:
            self._close_block()
        if self._ends_in_hole:
            os.ftruncate(self._fd, self.size)
        os.fsync(self._fd)
        return FileEntry(self.size, self._whole.hexdigest(), tuple(self._blocks))

    def _hash(self, part: memoryview) -> None:
        self._whole.update(part)
        while part:
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            piece = part[:room]
            self._block.update(piece)
            self.size += len(piece)
            part = part[room:]
            if self.size % BLOCK_BYTES == 0:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = blake3()


def is_zero(part: memoryview) -> bool:
    """Return whether ``part`` is long and all zero; looks at three bytes first."""
    length = len(part)
    return (
        length >= _MIN_HOLE_BYTES
        and not (part[0] or part[length // 2] or part[-1])
        and part.tobytes() == _ZEROS[:length]
    )


def hash_windows(windows: Iterable[Buffer]) -> str:
    """Return the BLAKE3 of the bytes in ``windows``, as hex."""
    hasher = blake3()
    for window in windows:
        hasher.update(window)
    return hasher.hexdigest()
