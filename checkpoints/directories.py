"""Where checkpoints lie: ``<directory>/step-<n>/``, and ``<directory>/latest``.

``latest`` is one line: the name of the newest step's directory, a space, its root.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import NamedTuple

from checkpoints.manifest import MANIFEST_NAME
from fabric.core.errors import ConfigError, IntegrityError, ResourceExhausted

LATEST_NAME = "latest"
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,15})")
_LATEST = re.compile(r"(step-(?:0|[1-9][0-9]{0,15})) ([0-9a-f]{64})\n")


class Location(NamedTuple):
    """A committed step, and the root it must have (empty: not known)."""

    path: Path
    root: str


def step_path(directory: Path, step: int) -> Path:
    """Return where ``step`` is committed."""
    if step < 0:
        raise ValueError(f"step {step} < 0")
    return directory / f"step-{step}"


def list_steps(directory: Path) -> list[int]:
    """Return the committed steps, ascending; half-written ones are never among them."""
    if not directory.is_dir():
        return []
    found = (
        match
        for entry in directory.iterdir()
        if (match := _STEP.fullmatch(entry.name)) and (entry / MANIFEST_NAME).is_file()
    )
    return sorted(int(match.group(1)) for match in found)


def locate(path: Path) -> Location:
    """Return the checkpoint at ``path``: a step's directory, or one with ``latest``.

    Raises:
        ConfigError: there is none.
        IntegrityError: ``latest`` is damaged.
    """
    if (path / MANIFEST_NAME).is_file():
        return Location(path, "")
    if (path / LATEST_NAME).is_file():
        return _read_latest_untrusted(path)
    raise ConfigError(
        f"no {MANIFEST_NAME} and no {LATEST_NAME} in {path}",
        code="E_NOT_FOUND",
        next_step="name the step-N directory, or the directory that holds it",
    )


def _read_latest_untrusted(path: Path) -> Location:
    with disk_errors(path), (path / LATEST_NAME).open("rb") as file:
        line = file.read(200)
    match = _LATEST.fullmatch(line.decode("ascii", errors="replace"))
    if match is None:
        raise IntegrityError(
            f"{path / LATEST_NAME} is damaged",
            code="E_LATEST",
            next_step="name a step-N directory instead",
        )
    return Location(path / match.group(1), match.group(2))


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the body into a typed error that names ``where``."""
    try:
        yield
    except OSError as exc:
        if exc.errno in {ENOSPC, EDQUOT, EFBIG}:
            raise ResourceExhausted(
                f"{where}: {exc.strerror}",
                code="E_DISK_FULL",
                next_step="free space, or write to another disk; nothing was committed",
            ) from exc
        raise ConfigError(
            f"{exc.filename or where}: {exc.strerror}",
            code="E_IO",
            next_step="check the path, its permissions and the disk",
        ) from exc


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock under which ``latest`` changes; waits for another save's rename."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and make its bytes survive a power loss."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
