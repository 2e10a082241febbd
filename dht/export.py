"""Read blocks of a blob and write its files back. Blocking."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dht.disk import disk_errors
from dht.manifest import BlobManifest, FileEntry
from dht.partial import PartialBlob
from fabric.core.digest import BLOCK_BYTES, digest
from fabric.core.errors import ConfigError, IntegrityError


class BlobReader:
    """Reads blocks of one blob, complete or arriving, into a caller's buffer."""

    def __init__(
        self, manifest: BlobManifest, fd: int | None, partial: PartialBlob | None
    ) -> None:
        self.manifest = manifest
        self._fd = fd
        self._partial = partial

    def read_into(self, index: int, buffer: memoryview) -> int:
        """Read block ``index``; return its size, or 0 if it is not here."""
        if not 0 <= index < self.manifest.num_blocks:
            return 0
        if self._fd is None:
            return self._partial.read_into(index, buffer) if self._partial else 0
        size = self.manifest.block_bytes(index)
        return os.preadv(self._fd, [buffer[:size]], index * BLOCK_BYTES)

    def read_verified(self, index: int) -> bytes:
        """Return block ``index``.

        Raises:
            IntegrityError: the bytes on disk are damaged or gone.
        """
        buffer = bytearray(self.manifest.block_bytes(index))
        got = self.read_into(index, memoryview(buffer))
        if got != len(buffer) or digest(buffer) != self.manifest.hashes[index]:
            raise IntegrityError(f"block {index} is damaged on disk")
        return bytes(buffer)


def write_sparse(reader: BlobReader, target: Path, blocks: int) -> None:
    """Write the blob's files as the new directory ``target``, with holes.

    Every file has its size; only ``blocks`` (a bitmap) are written, each verified.
    """
    target.mkdir(parents=True)
    for entry in reader.manifest.entries:
        path = target / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        first, end = entry.offset // BLOCK_BYTES, entry.offset + entry.size
        with path.open("xb") as file:
            file.truncate(entry.size)
            for index in range(first, -(-end // BLOCK_BYTES)):
                if blocks >> index & 1:
                    at = index * BLOCK_BYTES
                    skip = max(0, entry.offset - at)
                    data = reader.read_verified(index)[skip : end - at]
                    file.seek(at + skip - entry.offset)
                    file.write(data)
            file.flush()
            os.fsync(file.fileno())


def write_target(reader: BlobReader, target: Path) -> None:
    """Write the blob as the new file or directory ``target``, whole or not at all.

    Raises:
        ConfigError: ``target`` was made by somebody else meanwhile.
        ResourceExhausted: the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".fabric-export-", dir=target.parent))
    try:
        with disk_errors():
            write_tree(reader, work / "tree")
        try:
            (work / "tree").rename(target)
        except OSError as exc:
            if target.exists():
                raise ConfigError(f"{target} exists") from exc
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_tree(reader: BlobReader, target: Path) -> None:
    """Write the blob as the new file or directory ``target``, every block verified.

    The manifest's paths were checked when it was decoded; ``target`` is made here, so
    no link in it can lead elsewhere.
    """
    manifest = reader.manifest
    entries = manifest.entries or (FileEntry(target.name, 0, manifest.size),)
    base = target if manifest.entries else target.parent
    held, block = -1, b""
    for entry in entries:
        path = base / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            at, end = entry.offset, entry.offset + entry.size
            while at < end:
                index, start = divmod(at, BLOCK_BYTES)
                if index != held:
                    held, block = index, reader.read_verified(index)
                at += file.write(block[start : start + end - at])
            file.flush()
            os.fsync(file.fileno())
