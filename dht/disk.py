"""What "on the disk" means: durable writes, and a full disk as its own error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fabric.core.errors import ResourceExhausted

E_DISK_FULL = "E_DISK_FULL"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Map a full disk to :class:`ResourceExhausted`; other errors stay as they are."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        raise ResourceExhausted(
            f"no space left: {exc}",
            code=E_DISK_FULL,
            next_step="free disk space, then try again",
        ) from exc


def write_durably(path: Path, data: bytes) -> None:
    """Have ``data`` at ``path``, whole or not at all, also after a power cut."""
    work = path.with_name(path.name + ".tmp")
    try:
        with disk_errors(), work.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.rename(path)
        sync_folder(path.parent)
    finally:
        work.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Have the names in the directory ``path`` on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
