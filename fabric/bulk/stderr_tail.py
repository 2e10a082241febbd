"""A worker's standard error: its end for error messages, a bounded file for people."""

from __future__ import annotations

import os
import threading
from pathlib import Path

KEPT_BYTES = 4096
"""End of the output that goes into an error's reason."""
MAX_LOG_BYTES = 1 << 20
"""Largest ``worker.log``: a worker in a loop of warnings must not fill the disk."""


class StderrTail:
    """Drain a pipe in a thread until every writer closed it.

    Args:
        fd: Read end of the pipe; owned and closed by the thread.
        log: File that receives the first MAX_LOG_BYTES; replaced, never followed as a
            link, because the worker can write beside it.
    """

    def __init__(self, fd: int, log: Path) -> None:
        self._fd = fd
        log.unlink(missing_ok=True)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._tail = b""
        self._ended = threading.Event()
        threading.Thread(target=self._drain, name="worker-log", daemon=True).start()

    def text(self, wait_seconds: float = 0.0) -> str:
        """Return the last KEPT_BYTES, decoded leniently.

        Args:
            wait_seconds: How long to wait for the end of the output.
        """
        self._ended.wait(wait_seconds)
        return self._tail.decode(errors="replace").strip()

    def _drain(self) -> None:
        room = MAX_LOG_BYTES
        try:
            while data := os.read(self._fd, 65536):
                self._tail = (self._tail + data)[-KEPT_BYTES:]
                room -= os.write(self._log, data[:room]) if room > 0 else 0
        except OSError as exc:  # a full disk ends the log, not the worker's output
            self._tail += f"\n[worker.log: {exc}]".encode()
        finally:
            os.close(self._fd)
            os.close(self._log)
            self._ended.set()
