"""Write a file in a second thread while the first one reads and hashes what comes next.

Hashing, reading and writing leave Python's lock, so they go on at the same time. What
is written is copied into one of a few buffers: sources overwrite theirs.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from checkpoints.hashed_file import Buffer, HashedFile

PART_BYTES = 2 << 20
BUFFERS = 3
"""6 MiB: one is filled, one written, one waits."""


class WriteBehind:
    """A writer of one file; :meth:`drain` before the file is finished.

    Args:
        file: Touched by the second thread alone until then.
    """

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: deque[tuple[Future[None], bytearray]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def write(self, data: Buffer) -> None:
        """Append ``data``, which may be overwritten then.

        Raises:
            OSError: an earlier part could not be written.
        """
        view = memoryview(data).cast("B")
        for at in range(0, len(view), PART_BYTES):
            part = view[at : at + PART_BYTES]
            buffer = self._buffer()
            buffer[: len(part)] = part
            copied = memoryview(buffer)[: len(part)]
            self._pending.append(
                (self._thread.submit(self._file.write, copied), buffer)
            )

    def drain(self) -> None:
        """Return when all of it was written.

        Raises:
            OSError: it could not be.
        """
        while self._pending:
            self._pending.popleft()[0].result()

    def _buffer(self) -> bytearray:
        if len(self._pending) < BUFFERS:
            return bytearray(PART_BYTES)
        written, buffer = self._pending.popleft()
        written.result()
        return buffer
