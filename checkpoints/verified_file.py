"""A file whose blocks are hashed before a byte of them is used."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from checkpoints.manifest import FileEntry
from fabric.core.digest import BLOCK_BYTES, hex_digest
from fabric.core.errors import IntegrityError

READ_BYTES = 4 << 20
"""One read call: four blocks."""
MAX_VECTORS = 512
"""Buffers of one read call; Linux takes 1024."""
CACHED_BLOCKS = 8
"""Blocks kept: neighbours in a file share them, and 8 MiB is nothing."""


class BlockMismatch(IntegrityError):
    """A block is not what the manifest says.

    Attributes:
        file: Its file's name.
        block: Its number; it begins at byte ``block`` * 1 MiB.
    """

    default_code = "E_BLOCK"

    def __init__(self, file: str, block: int) -> None:
        super().__init__(
            f"{file}: block {block} (from byte {block * BLOCK_BYTES}) is damaged",
            next_step="fetch this block again, or use another copy or step",
        )
        self.file = file
        self.block = block


class BlockCache:
    """The last few verified blocks of all files of one reader."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], bytearray] = OrderedDict()

    def get(self, file: str, block: int) -> bytearray | None:
        """Return a kept block, or None."""
        found = self._blocks.get((file, block))
        if found is not None:
            self._blocks.move_to_end((file, block))
        return found

    def put(self, file: str, block: int, data: bytearray) -> None:
        """Keep ``data``; forget the block used longest ago."""
        self._blocks[file, block] = data
        if len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)


class VerifiedFile:
    """One file of a checkpoint, open for reading.

    Raises:
        IntegrityError: missing (``E_MISSING_FILE``), or of another size (``E_SIZE``).
    """

    def __init__(self, path: Path, entry: FileEntry, cache: BlockCache) -> None:
        self._name = path.name
        self._entry = entry
        self._cache = cache
        try:
            # O_NONBLOCK: a FIFO in the file's place must not hang us.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise IntegrityError(
                f"{path}: {exc.strerror}",
                code="E_MISSING_FILE",
                next_step="fetch the file again, or use another copy or step",
            ) from exc
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
            os.close(self._fd)
            raise IntegrityError(
                f"{path}: {found.st_size} B, the manifest says {entry.size}",
                code="E_SIZE",
                next_step="the file was cut or replaced: use another copy or step",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` on.

        Raises:
            BlockMismatch: a touched block is damaged; ``out`` is then undefined.
        """
        at = 0
        while at < len(out):
            block, inside = divmod(begin + at, BLOCK_BYTES)
            direct = 0 if inside else self._whole_blocks(begin + at, len(out) - at)
            if direct:
                view = out[at : at + direct]
                self.read_raw(begin + at, view)
                bad = self.bad_blocks(block, view)
                if bad:
                    raise BlockMismatch(self._name, bad[0])
                at += direct
                continue
            data = memoryview(self._block(block))[inside : inside + len(out) - at]
            out[at : at + len(data)] = data
            at += len(data)

    def read_blocks(self, first: int, parts: Sequence[memoryview]) -> None:
        """Fill ``parts``, one after the other, with whole blocks from ``first`` on.

        Several threads may call this at once.

        Args:
            first: Number of the first block.
            parts: Bytes of whole blocks together, the file's last one being shorter.

        Raises:
            BlockMismatch: a block is damaged; ``parts`` are then undefined.
        """
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        at = first * BLOCK_BYTES
        while left:
            count = self._preadv(left[:MAX_VECTORS], at)
            at += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        for number, found in enumerate(_block_hashes(parts), start=first):
            if found != self._entry.blocks[number]:
                raise BlockMismatch(self._name, number)

    def bad_blocks(self, first: int, data: memoryview) -> list[int]:
        """Return which blocks of ``data``, the first being ``first``, are damaged."""
        count = -(-len(data) // BLOCK_BYTES)
        return [
            first + number
            for number in range(count)
            if hex_digest(data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
            != self._entry.blocks[first + number]
        ]

    def read_raw(self, begin: int, out: memoryview) -> None:
        """Fill ``out`` without checking it.

        Raises:
            IntegrityError: the file ends early, or the disk cannot read it.
        """
        at = 0
        while at < len(out):
            at += self._preadv([out[at:]], begin + at)

    def _preadv(self, parts: Sequence[memoryview], at: int) -> int:
        """Read once, at least one byte."""
        try:
            count = os.preadv(self._fd, parts, at)
        except OSError as exc:
            raise IntegrityError(
                f"{self._name}: byte {at}: {exc.strerror}", code="E_READ"
            ) from exc
        if count == 0:
            raise IntegrityError(f"{self._name}: ends at byte {at}", code="E_SIZE")
        return count

    def _whole_blocks(self, begin: int, wanted: int) -> int:
        """Return how many bytes from block start ``begin`` are whole wanted blocks."""
        if begin + wanted == self._entry.size and wanted <= READ_BYTES:
            return wanted
        return min(wanted, READ_BYTES) // BLOCK_BYTES * BLOCK_BYTES

    def _block(self, block: int) -> bytearray:
        """Return one verified block, from the cache if it is there."""
        data = self._cache.get(self._name, block)
        if data is None:
            begin = block * BLOCK_BYTES
            data = bytearray(min(BLOCK_BYTES, self._entry.size - begin))
            self.read_raw(begin, memoryview(data))
            if self.bad_blocks(block, memoryview(data)):
                raise BlockMismatch(self._name, block)
            self._cache.put(self._name, block, data)
        return data


def _block_hashes(parts: Sequence[memoryview]) -> Iterator[str]:
    """Yield the hash of each block of the bytes in ``parts``."""
    hasher = blake3()
    room = BLOCK_BYTES
    for part in parts:
        rest = part
        while rest:
            piece = rest[:room]
            hasher.update(piece)
            rest = rest[len(piece) :]
            room -= len(piece)
            if not room:
                yield hasher.hexdigest()
                hasher, room = blake3(), BLOCK_BYTES
    if room < BLOCK_BYTES:
        yield hasher.hexdigest()
