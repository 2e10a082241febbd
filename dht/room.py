"""How much of its disk a content store uses, and whether more fits. Blocking.

A part counts what was promised to it while it is received, and what lies on the disk
while it rests: a part of a few blocks of a large blob is a sparse file.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dht.disk import E_DISK_FULL
from fabric.core.errors import ResourceExhausted

_SECTOR_BYTES = 512
"""Unit of ``st_blocks``."""


class Room:
    """The room of one store.

    Args:
        directory: The store's.
        max_bytes: Most bytes kept, complete and arriving together.

    Attributes:
        max_bytes: The same.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._dir = directory
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._reserved = 0
        self._promised: dict[str, int] = {}

    def used(self) -> int:
        """Return the bytes kept, promised to parts and reserved."""
        complete = sum(map(on_disk, (self._dir / "data").iterdir()))
        parts = 0
        for path in (self._dir / "parts").iterdir():
            parts += max(self._promised.get(path.name, 0), on_disk(path))
        return complete + parts + self._reserved

    def free(self) -> int:
        """Return how many more bytes fit, by our own bound and by the disk's."""
        left = self.max_bytes - self.used()
        return max(0, min(left, shutil.disk_usage(self._dir).free))

    def require(self, size: int) -> None:
        """Pass if ``size`` more bytes fit.

        Raises:
            ResourceExhausted: they do not.
        """
        used = self.used()
        if used + size > self.max_bytes:
            raise ResourceExhausted(
                f"content store holds {used} B of {self.max_bytes} B; "
                f"no room for {size} B",
                next_step="raise content.max_bytes",
            )
        free = shutil.disk_usage(self._dir).free
        if free < size:
            raise ResourceExhausted(
                f"disk has {free} B free, {size} B needed",
                code=E_DISK_FULL,
                next_step="free disk space, then try again",
            )

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Hold room for ``size`` bytes while inside."""
        with self._lock:
            self.require(size)
            self._reserved += size
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= size

    def promise(self, name: str, size: int) -> None:
        """The part ``name`` may grow to ``size`` bytes on the disk."""
        with self._lock:
            self.require(size - on_disk(self._dir / "parts" / name))
            self._promised[name] = size

    def forget(self, name: str) -> None:
        """The part ``name`` is not received any more."""
        with self._lock:
            self._promised.pop(name, None)


def on_disk(path: Path) -> int:
    """Return the bytes that the file takes on the disk, its holes left out."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return min(found.st_size, found.st_blocks * _SECTOR_BYTES)
