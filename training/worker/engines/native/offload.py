"""Optimizer states in a file on an SSD, streamed through a small pool of buffers.

::

    file    | master first second | master first second | ...     one record per slab
    pool    [ read ahead ] [ being updated ] [ written behind ]

Memory is three records, whatever the size of the states. The buffers are made once,
page-aligned and exactly as large as the largest record: no allocator rounds them up or
keeps copies. Records begin at multiples of a page, so that O_DIRECT can bypass the page
cache; where the file system refuses it, the cache is used and given back.

Source: MemAscend (arXiv:2505.23254): pooled, alignment-aware buffers for offloading.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from fabric.core.errors import ConfigError, FabricError, ResourceExhausted
from training.worker.engines.native.states import Slab

PAGE_BYTES = 4096
SLAB_ELEMENTS = 1 << 20
"""Elements per record: 12 MiB of states, enough to run an SSD at its bandwidth."""
BUFFERS = 3
"""Read ahead, updated, written behind."""


class _Record(NamedTuple):
    unit: int
    begin: int
    numel: int
    offset: int

    @property
    def size(self) -> int:
        return -(-12 * self.numel // PAGE_BYTES) * PAGE_BYTES


class FileStates:
    """States of one rank in a file of its own, which ends with this object.

    Args:
        spans: Begin and end of each unit in the packed states.
        path: The file; made, and removed by :meth:`close`.
        slab_elements: Elements per record.

    Attributes:
        direct: Whether the page cache is bypassed.
        pool_bytes: Size of all buffers.

    Raises:
        ResourceExhausted: the disk has no room for all states.
        ConfigError: the file system refuses.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        path: Path,
        slab_elements: int = SLAB_ELEMENTS,
    ) -> None:
        self._records = _records(spans, slab_elements)
        self._path = path
        last = self._records[-1] if self._records else _Record(0, 0, 0, 0)
        self._size = last.offset + last.size
        with _errors(path):
            self._fd, self.direct = _open(path)
            if self._size:
                os.posix_fallocate(self._fd, 0, self._size)
        largest = max((record.size for record in self._records), default=PAGE_BYTES)
        self.pool_bytes = BUFFERS * largest
        self._pool = [mmap.mmap(-1, largest) for _ in range(BUFFERS)]
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="states")
        self._view: mmap.mmap | None = None

    def sweep(self) -> Iterator[Slab]:
        """Yield all states, record by record; what the caller changed is written."""
        self._flush()
        free = list(self._pool)
        reads: deque[tuple[mmap.mmap, Future[None]]] = deque()
        writes: deque[tuple[mmap.mmap, Future[None]]] = deque()

        def read(record: _Record) -> None:
            if not free:
                written, write = writes.popleft()
                write.result()
                free.append(written)
            buffer = free.pop()
            reads.append((buffer, self._threads.submit(self._read, record, buffer)))

        try:
            for record, following in zip_longest(self._records, self._records[1:]):
                if not reads:
                    read(record)
                buffer, pending = reads.popleft()
                pending.result()
                if following is not None:
                    read(following)
                yield _slab(record, buffer, 0)
                work = self._threads.submit(self._write, record, buffer)
                writes.append((buffer, work))
            while writes:
                writes.popleft()[1].result()
        finally:
            wait([pending for _, pending in (*reads, *writes)])

    def slabs(self) -> list[Slab]:
        """Return views of all states, mapped from the file: pages come as touched."""
        if self._view is None and self._size:
            self._view = mmap.mmap(self._fd, self._size)
        view = self._view
        return [_slab(r, view, r.offset) for r in self._records] if view else []

    def close(self) -> None:
        """End the threads and remove the file."""
        self._threads.shutdown(wait=True)
        self._view = None
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def _read(self, record: _Record, buffer: mmap.mmap) -> None:
        self._transfer(os.preadv, record, buffer)

    def _write(self, record: _Record, buffer: mmap.mmap) -> None:
        self._transfer(os.pwritev, record, buffer)

    def _transfer(
        self,
        call: Callable[[int, list[memoryview], int], int],
        record: _Record,
        buffer: mmap.mmap,
    ) -> None:
        with _errors(self._path), memoryview(buffer) as view:
            at = 0
            while at < record.size:
                part = view[at : record.size]
                moved = call(self._fd, [part], record.offset + at)
                part.release()
                if moved <= 0:
                    raise OSError(errno.EIO, f"{record.size - at} bytes are missing")
                at += moved
        if not self.direct:  # given back, so that other memory is not
            os.posix_fadvise(
                self._fd, record.offset, record.size, os.POSIX_FADV_DONTNEED
            )

    def _flush(self) -> None:
        if self._view is not None:
            with _errors(self._path):
                self._view.flush()
            self._view = None


def _records(spans: Sequence[tuple[int, int]], most: int) -> list[_Record]:
    records: list[_Record] = []
    offset = 0
    for unit, (first, last) in enumerate(spans):
        for begin in range(first, last, most):
            record = _Record(unit, begin, min(most, last - begin), offset)
            records.append(record)
            offset += record.size
    return records


def _slab(record: _Record, buffer: mmap.mmap, offset: int) -> Slab:
    values = torch.frombuffer(
        buffer, dtype=torch.float32, count=3 * record.numel, offset=offset
    )
    return Slab(record.unit, record.begin, *values.chunk(3))


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # made before it was refused
    return os.open(path, flags, 0o600), False


class _errors:  # noqa: N801  (reads as a function)
    """Turns what the file system says into our errors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, FabricError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"no room for optimizer states in {self._path.parent}",
                code="E_DISK_FULL",
                next_step="choose another directory, or a larger d_o",
            ) from error
        raise ConfigError(
            f"{self._path}: {error}", code="E_OFFLOAD", next_step="see the file system"
        ) from error
