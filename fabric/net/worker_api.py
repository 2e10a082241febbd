"""The worker link as both ends see it: frames and file descriptors.

Daemon side: ``worker_link.open_worker`` (trio). Worker side:
``fabric.bulk.worker_port`` (blocking). A frame is 4-byte big-endian length + bytes, at
most MAX_WORKER_FRAME; it may carry file descriptors (SCM_RIGHTS) that arrive with its
first byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fabric.bulk.sandbox import WorkerLimits as WorkerLimits
from fabric.bulk.worker_port import MAX_WORKER_FRAME as MAX_WORKER_FRAME


class WorkerLink(Protocol):
    """One worker process, seen from the daemon."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    async def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send one frame; the worker receives duplicates of ``fds``.

        Raises:
            Unavailable: the worker exited; the reason holds its exit status and the
                end of its standard error.
        """
        ...

    async def receive(self) -> bytes:
        """Return the worker's next frame.

        Raises:
            Unavailable: the worker exited.
            RemoteProtocolError: the worker sent an oversized frame.
        """
        ...
