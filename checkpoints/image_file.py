"""Write a file from one piece of memory: hashed beside the write, past the page cache.

The bytes of a staged save are in memory already and will not be read again soon. Where
the file system allows it they go to the disk without a copy in the page cache
(O_DIRECT), which is faster and evicts nothing; elsewhere they are written as usual.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EINVAL
from pathlib import Path

from blake3 import blake3

from checkpoints.manifest import FileEntry
from checkpoints.part_layout import PAGE_BYTES
from fabric.core.digest import BLOCK_BYTES

WRITE_BYTES = 16 << 20
"""One write call; hashing takes place meanwhile, window by window."""


def hash_image(image: memoryview) -> FileEntry:
    """Return the entry that a file of these bytes has."""
    whole = blake3()
    blocks = []
    for at in range(0, len(image), BLOCK_BYTES):
        block = image[at : at + BLOCK_BYTES]
        whole.update(block)  # twice while it is in the processor's cache
        blocks.append(blake3(block).hexdigest())
    return FileEntry(len(image), whole.hexdigest(), tuple(blocks))


def write_image(path: Path, image: memoryview, padded: memoryview) -> FileEntry:
    """Write and sync a new file, and return its entry.

    Args:
        path: Must not exist.
        image: The file's bytes.
        padded: The same memory up to a multiple of 4 KiB, its start aligned to that.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        entry: Future[FileEntry] = pool.submit(hash_image, image)
        if not _write_direct(path, image, padded):
            with _created(path, 0) as fd:
                _write_all(fd, image)
                os.fsync(fd)
        return entry.result()


def _write_direct(path: Path, image: memoryview, padded: memoryview) -> bool:
    """Return whether the file system took unaligned-free, unbuffered writes."""
    if len(image) < BLOCK_BYTES or len(padded) % PAGE_BYTES:
        return False
    try:
        with _created(path, os.O_DIRECT) as fd:
            _write_all(fd, padded)
            os.ftruncate(fd, len(image))
            os.fsync(fd)
    except OSError as exc:
        if exc.errno != EINVAL:
            raise
        with suppress(FileNotFoundError):
            path.unlink()
        return False
    return True


@contextmanager
def _created(path: Path, flags: int) -> Iterator[int]:
    flags |= os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    for at in range(0, len(data), WRITE_BYTES):
        part = data[at : at + WRITE_BYTES]
        while part:
            part = part[os.write(fd, part) :]
