"""Some blocks of a blob, for who needs no more: got from others as they are needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio

from dht import bitmap
from dht.blobs import BlobStore
from dht.disk import disk_errors
from dht.export import write_sparse
from dht.manifest import BlobManifest
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, Unavailable
from fabric.core.ids import BlobId

Bytes = tuple[int, int]
"""A range of the blob's bytes: begin, end."""


class PartialContent:
    """A blob of which some blocks are here. Made by ``ContentService.partly``.

    Args:
        blobs: The store.
        root: The blob.
        manifest: Its manifest.
        download: Has the blocks of a bitmap here when it returns.

    Attributes:
        needed: Every block asked for so far, as a bitmap.
    """

    def __init__(
        self,
        blobs: BlobStore,
        root: BlobId,
        manifest: BlobManifest,
        download: Callable[[int], Awaitable[None]],
    ) -> None:
        self.manifest = manifest
        self.needed = 0
        self._blobs, self._root, self._download = blobs, root, download

    @property
    def needed_bytes(self) -> int:
        """Bytes of the blocks asked for."""
        return blocks_bytes(self.manifest, self.needed)

    async def need(self, ranges: Iterable[Bytes]) -> None:
        """Have the blocks that ``ranges`` touch here, verified.

        Raises:
            Unavailable: no reachable peer holds one of them.
            ResourceExhausted: no room for them.
        """
        blocks = blocks_of(ranges)
        await self._download(blocks)
        self.needed |= blocks

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Return the contents of one file of the blob.

        Raises:
            ConfigError: there is none, or it is larger than ``max_bytes``.
            Unavailable: no reachable peer holds it.
        """
        for entry in self.manifest.entries:
            if entry.path == path and entry.size <= max_bytes:
                ends = entry.offset, entry.offset + entry.size
                await self.need([ends])
                return await trio.to_thread.run_sync(self._read, *ends)
        raise ConfigError(
            f"content {self._root[:12]} has no {path} of at most {max_bytes} B",
            code="E_NOT_FOUND",
            next_step="is it the root of a checkpoint? `fabric content ls` shows names",
        )

    async def write_sparse(self, target: Path) -> None:
        """Write the files, with the needed blocks in them, as directory ``target``.

        Raises:
            ResourceExhausted: the disk is full.
            IntegrityError: a block was damaged on this disk meanwhile.
        """
        await trio.to_thread.run_sync(self._write_sparse, target)

    def _write_sparse(self, target: Path) -> None:
        with disk_errors(), self._blobs.open_reader(self._root) as reader:
            write_sparse(reader, target, self.needed)

    def _read(self, begin: int, end: int) -> bytes:
        first = begin // BLOCK_BYTES
        with self._blobs.open_reader(self._root) as reader:
            found = [
                reader.read_verified(index)
                for index in range(first, -(-end // BLOCK_BYTES))
            ]
        start = begin - first * BLOCK_BYTES
        data = b"".join(found)[start : start + end - begin]
        if len(data) != end - begin:
            raise Unavailable(f"bytes {begin}-{end} of {self._root[:12]} are not here")
        return data


def blocks_of(ranges: Iterable[Bytes]) -> int:
    """Return the blocks that ``ranges`` touch, as a bitmap."""
    found = 0
    for begin, end in ranges:
        if begin < end:
            found |= bitmap.span(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
    return found


def blocks_bytes(manifest: BlobManifest, blocks: int) -> int:
    """Return the bytes of ``blocks`` of the blob."""
    return sum(manifest.block_bytes(index) for index in bitmap.members(blocks))
