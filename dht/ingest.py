"""Turn files into blocks while they are copied into the store. Blocking."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from dht.manifest import MAX_ENTRIES
from fabric.core.digest import BLOCK_BYTES, digest
from fabric.core.errors import ConfigError, ResourceExhausted


class BlockWriter:
    """Appends bytes to ``file``, hashing each 1 MiB block of the whole.

    Attributes:
        path: Where ``file`` lies.
        size: Bytes taken so far.
    """

    def __init__(self, file: FileIO, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = file
        self._block = bytearray(BLOCK_BYTES)
        self._filled = 0
        self._hashes: list[bytes] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view = memoryview(data)
        while view:
            room = memoryview(self._block)[self._filled :]
            taken = min(len(room), len(view))
            room[:taken] = view[:taken]
            view = view[taken:]
            self._took(taken)

    def copy(self, path: Path) -> None:
        """Append the contents of the file at ``path``."""
        with path.open("rb", buffering=0) as source:
            while taken := source.readinto(memoryview(self._block)[self._filled :]):
                self._took(taken)

    def finish(self) -> tuple[bytes, ...]:
        """Have everything on the disk and return the hashes of the blocks."""
        if self._filled:
            self._flush()
        os.fsync(self._file.fileno())
        return tuple(self._hashes)

    def _took(self, taken: int) -> None:
        self._filled += taken
        self.size += taken
        if self._filled == BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        view = memoryview(self._block)[: self._filled]
        self._hashes.append(digest(view))
        while view:
            view = view[self._file.write(view) :]
        self._filled = 0


def directory_files(root: Path) -> list[tuple[str, Path]]:
    """Return (relative POSIX path, path) of every file below ``root``, in path order.

    Raises:
        ConfigError: no directory, no files, or it holds a link or a device.
        ResourceExhausted: more files than a manifest can name.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory")
    found = []
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise ConfigError(
                f"{path} is neither a file nor a directory",
                next_step="content holds plain files; copy what the link points to",
            )
        found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise ConfigError(f"{root} holds no files")
    if len(found) > MAX_ENTRIES:
        raise ResourceExhausted(f"{len(found)} files > {MAX_ENTRIES}")
    return sorted(found)
