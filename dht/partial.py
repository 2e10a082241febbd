"""A blob that is still arriving. Blocking; safe to use from several threads."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from dht import bitmap
from dht.disk import disk_errors
from dht.manifest import BlobManifest
from fabric.core.digest import BLOCK_BYTES, digest
from fabric.core.ids import BlobId


class PartialBlob:
    """The ``.part`` file of one blob and which of its blocks are verified.

    What was on disk is hashed again when the file is opened: a block that a crash left
    half written is fetched again, and no second file has to agree with the first.

    Args:
        root: Root of the blob.
        manifest: Its checked manifest.
        path: The part file; created if missing.
    """

    def __init__(self, root: BlobId, manifest: BlobManifest, path: Path) -> None:
        self.root = root
        self.manifest = manifest
        self.path = path
        self._lock = threading.Lock()
        self._closed = False
        self._have = 0
        fresh = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with disk_errors():
            os.ftruncate(self._fd, manifest.size)
        if not fresh:
            self._verify()

    @property
    def have(self) -> int:
        """Verified blocks, as a bitmap."""
        return self._have

    @property
    def complete(self) -> bool:
        """Whether every block is verified."""
        return self._have == bitmap.full(self.manifest.num_blocks)

    def write_block(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Keep block ``index``; return whether ``data`` is that block.

        A block that is already here, or arrives after :meth:`close`, is checked and
        not written.

        Raises:
            ResourceExhausted: the disk is full; what was verified stays usable.
        """
        if digest(data) != self.manifest.hashes[index]:
            return False
        # One lock per write: it keeps close() from freeing the descriptor under us.
        with self._lock:
            if self._closed or self._have >> index & 1:
                return True
            with disk_errors():
                _pwrite_all(self._fd, data, index * BLOCK_BYTES)
            self._have |= 1 << index
        return True

    def read_into(self, index: int, buffer: memoryview) -> int:
        """Read block ``index`` into ``buffer``; return its size, 0 if not here yet."""
        with self._lock:
            if self._closed or not self._have >> index & 1:
                return 0
            size = self.manifest.block_bytes(index)
            return os.preadv(self._fd, [buffer[:size]], index * BLOCK_BYTES)

    def sync(self) -> None:
        """Have every written block on the disk."""
        with disk_errors():
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; the part stays on disk and can be opened again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)

    def _verify(self) -> None:
        buffer = bytearray(BLOCK_BYTES)
        for index in bitmap.members(self._written()):
            wanted = self.manifest.hashes[index]
            view = memoryview(buffer)[: self.manifest.block_bytes(index)]
            got = os.preadv(self._fd, [view], index * BLOCK_BYTES)
            if got == len(view) and digest(view) == wanted:
                self._have |= 1 << index

    def _written(self) -> int:
        """Return the blocks that the file may hold: holes in it were never written."""
        found, at = 0, 0
        while at < self.manifest.size:
            try:
                begin = os.lseek(self._fd, at, os.SEEK_DATA)
                at = os.lseek(self._fd, begin, os.SEEK_HOLE)
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    break  # nothing but a hole from here on
                return bitmap.full(self.manifest.num_blocks)
            found |= bitmap.span(begin // BLOCK_BYTES, -(-at // BLOCK_BYTES))
        return found


def _pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
