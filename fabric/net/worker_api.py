"""The worker link as both ends see it: frames and file descriptors.

Daemon side: ``worker_link.open_worker`` (trio). Worker side:
``fabric.bulk.worker_port`` (blocking). A frame is 4-byte big-endian length + bytes, at
most MAX_WORKER_FRAME; it may carry file descriptors (SCM_RIGHTS) that arrive with its
first byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

MAX_WORKER_FRAME = 4 << 20
"""Commands and events are small; tensors go by bulk connection or mapped file."""


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker may use. Enforced by the worker on itself before foreign code runs.

    Landlock paths, no_new_privs, rlimits and a seccomp filter that refuses new network
    sockets (DESIGN section 2).
    """

    scratch: Path
    """The only directory the worker may write."""
    readable: tuple[Path, ...] = ()
    """Read-only directories besides the interpreter and its packages."""
    memory_bytes: int = 8 << 30
    """Address space above what the interpreter maps at start (RLIMIT_DATA)."""
    open_files: int = 1024
    threads: int = 1
    """torch threads: cores / worker processes."""


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
