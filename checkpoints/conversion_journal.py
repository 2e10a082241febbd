"""The journal of a conversion: which files are whole, so that a later run goes on.

It lies in the working directory beside the files. The first line says what is converted
and how; a run with another first line starts afresh. Each further line is a file, added
and synced after the file itself was synced.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
from blake3 import blake3

from checkpoints.conversion_bundle import HashedBox
from checkpoints.formats.source import Source
from checkpoints.manifest import FileEntry
from fabric.core.errors import ConfigError

JOURNAL_NAME = ".fabric-convert.jsonl"
VERSION = 2


class Heading(msgspec.Struct, frozen=True):
    """What is converted and how: equal headings give equal files."""

    version: int
    source: str
    plan: str


class WholeFile(msgspec.Struct, frozen=True):
    """A file that is whole.

    Attributes:
        path: Relative to the target.
        size: Its bytes.
        entry: Size and hashes, if the format writes them down.
        hashed: The boxes of tensors in it.
    """

    path: str
    size: int
    entry: FileEntry | None
    hashed: list[HashedBox]


class Journal:
    """The open journal of a working directory.

    Attributes:
        whole: Files of a run before this one, by path.
        started_afresh: There was a run before this one, of something else.
    """

    def __init__(self, directory: Path, heading: Heading) -> None:
        self._path = directory / JOURNAL_NAME
        self._lock = threading.Lock()
        self.started_afresh = False
        self.whole: dict[str, WholeFile] = {}
        lines = _lines(self._path)
        if lines and lines[0] == msgspec.json.encode(heading):
            self.whole = {
                each.path: each
                for each in map(_whole_file, lines[1:])
                if each is not None and _has_size(directory / each.path, each.size)
            }
        else:
            self.started_afresh = bool(lines)
        _remove_others(directory, set(self.whole))
        rest = [msgspec.json.encode(each) for each in self.whole.values()]
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(b"\n".join([msgspec.json.encode(heading), *rest, b""]))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path)

    def add(self, each: WholeFile) -> None:
        """Record a file whose bytes are on the disk."""
        with self._lock, self._path.open("ab") as file:
            file.write(msgspec.json.encode(each) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[bytes]:
    """Return the whole lines of a journal; none if there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return data[: data.rfind(b"\n") + 1].splitlines()


def _whole_file(line: bytes) -> WholeFile | None:
    try:
        return msgspec.json.decode(line, type=WholeFile)
    except msgspec.MsgspecError:
        return None  # torn by a loss of power: that file is written again


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _remove_others(directory: Path, keep: set[str]) -> None:
    """Remove what no line of the journal says is whole."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in {*keep, JOURNAL_NAME}:
            path.unlink()


@contextmanager
def working_directory(path: Path, *, may_hold_others: bool) -> Iterator[None]:
    """Make and lock the directory in which a target grows.

    Args:
        path: The directory.
        may_hold_others: Its name is reserved for half-written things: whatever is in it
            is stale.

    Raises:
        ConfigError: another process works there, or it holds something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing {path}",
                code="E_BUSY",
                next_step="let it finish, or name another target",
            ) from None
        known = may_hold_others or (path / JOURNAL_NAME).is_file()
        if not known and any(path.iterdir()):
            raise ConfigError(
                f"{path} holds files that no conversion left",
                code="E_EXISTS",
                next_step="move or remove it, or name another target",
            )
        yield
    finally:
        os.close(lock)


def discard(path: Path) -> None:
    """Remove a working directory that is of no use to a later run."""
    shutil.rmtree(path, ignore_errors=True)


def fingerprint(source: Source) -> str:
    """Return what changes if the files of ``source`` do: root, or names, sizes, times.

    Names, sizes and times of files that were merely replaced in place by equal ones
    differ too; a conversion then starts afresh.
    """
    root = getattr(source, "root", "")
    if root:
        return f"root {root}"
    hasher = blake3()
    path = source.path
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        if each.is_file():
            found = each.stat()
            line = (str(each.relative_to(path)), found.st_size, found.st_mtime_ns)
            hasher.update(msgspec.json.encode(line))
    return f"files {hasher.hexdigest()}"


def digest_of(value: Mapping[str, object]) -> str:
    """Return a hash of plain values."""
    return blake3(msgspec.json.encode(value, order="deterministic")).hexdigest()
