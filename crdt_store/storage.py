"""The store on disk: SQLite, blocking. Call it from one thread at a time.

Two connections to one WAL database. Entries are committed with NORMAL sync: they
survive the death of the process, and the tail that a power loss takes is repaired from
peers. The clock's mark and promises of the job protocol are committed with FULL sync:
nobody else can tell us what we promised.

    entry(key, author) -> hlc, raw       evidence(id) -> both raws of an equivocation
    meta(name) -> value                  promise(job) -> counter, hash, blob
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from crdt_store.entry import Entry, Slot
from fabric.core.digest import digest
from fabric.core.errors import (
    ConfigError,
    FabricError,
    IntegrityError,
    LocalProtocolError,
    ResourceExhausted,
)

_SCHEMA_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS entry (
    key TEXT NOT NULL, author BLOB NOT NULL, id BLOB NOT NULL, raw BLOB NOT NULL,
    PRIMARY KEY (key, author)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evidence (
    id BLOB PRIMARY KEY, one BLOB NOT NULL, other BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (
    name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS promise (
    job TEXT PRIMARY KEY, counter INTEGER NOT NULL, hash BLOB NOT NULL,
    blob BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {_SCHEMA_VERSION};
"""
_MAX_EVIDENCE_ROWS = 1000
_MAX_WAL_BYTES = 4 << 20
"""The log is cut to this after a checkpoint; SQLite makes one every 1000 pages."""
_FREE_PAGES_KEPT = 1000
_BUSY_SECONDS = 5.0
"""Longest wait for the other connection's commit."""


class Promise(msgspec.Struct, frozen=True):
    """The highest epoch this peer acked for a job.

    Attributes:
        counter: Fencing epoch.
        hash: BLAKE3 of ``blob``.
        blob: The encoded promise, opaque here.
    """

    counter: int
    hash: bytes
    blob: bytes


class Storage(Protocol):
    """Where a store keeps what must survive it (SQLite here, or memory in tests)."""

    @property
    def blocking(self) -> bool:
        """Whether calls wait for a disk and belong in a thread."""
        ...

    def load(self) -> list[bytes]:
        """Return every stored entry."""
        ...

    def write(
        self,
        upserts: Sequence[Entry],
        deletes: Sequence[Slot],
        evidence: Sequence[tuple[Entry, Entry]] = (),
    ) -> None:
        """Commit all deletions and upserts, or nothing."""
        ...

    def high_water(self) -> int:
        """Return the clock's mark, 0 when there is none."""
        ...

    def save_high_water(self, mark: int) -> None:
        """Have a mark of at least ``mark`` on disk."""
        ...

    def save_promise(self, job: str, counter: int, blob: bytes) -> None:
        """Have the promise on disk.

        Raises:
            LocalProtocolError: a higher counter is promised already.
        """
        ...

    def forget_promises(self, jobs: frozenset[str]) -> None:
        """Hold nothing of ``jobs``, whatever was promised."""
        ...

    def load_promises(self) -> dict[str, Promise]:
        """Return the promises by job."""
        ...

    def close(self) -> None:
        """Release the files."""
        ...


@contextmanager
def lock_data_folder(path: Path, name: str = "lock") -> Iterator[None]:
    """Hold ``path`` (made if missing) for this process alone.

    The kernel drops the lock with the process, however it ends.

    Raises:
        ConfigError: another process has it, or the folder cannot be written.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(
            f"cannot use the data folder {path}: {exc.strerror}",
            code="E_DATA_FOLDER",
            next_step="make it writable for this user, or name another one",
        ) from exc
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(
                f"the data folder {path} is in use by another process",
                code="E_DATA_FOLDER_IN_USE",
                next_step="stop the other daemon (fabric down), or name another folder",
            ) from exc
        yield
    finally:
        os.close(handle)


def storage_error(exc: sqlite3.Error, path: Path) -> FabricError:
    """Return the error that says who must act on ``exc``."""
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            f"no space left for {path}",
            code="E_DISK_FULL",
            next_step="free disk space; what was acknowledged is safe",
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return ConfigError(
            f"cannot write {path}: {exc}",
            code="E_DATA_FOLDER",
            next_step="make the data folder writable for this user",
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _corrupt(path, str(exc))
    return ResourceExhausted(
        f"cannot write {path}: {exc}",
        code="E_DISK",
        next_step="check the disk; what was acknowledged is safe",
    )


def _corrupt(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"the store {path} is damaged: {why}",
        code="E_STORE_CORRUPT",
        next_step=f"move {path.name}* away and start again: entries come back from "
        "peers, but promises to running jobs are lost, so leave those jobs first",
    )


class SqliteStorage:
    """The SQLite database at ``path``, opened and checked.

    Raises:
        IntegrityError: not our database, or damaged.
        ConfigError: cannot be opened for writing, or made by a later version.
    """

    blocking = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries: sqlite3.Connection | None = None
        self._durable: sqlite3.Connection | None = None
        with self._mapped():
            self._entries = self._connect("NORMAL")
            self._durable = self._connect("FULL")
            version = self._entries.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise ConfigError(
                    f"{path} was made by a later version ({version})",
                    next_step="upgrade peerfabric",
                )
            self._entries.executescript(_SCHEMA)
            self._shrink(self._entries)

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA journal_size_limit = {_MAX_WAL_BYTES}")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        return connection

    @staticmethod
    def _shrink(connection: sqlite3.Connection) -> None:
        """Give free pages back if they are most of the file: entries expire."""
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        if free > max(pages // 2, _FREE_PAGES_KEPT):
            connection.execute("VACUUM")

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as exc:
                raise storage_error(exc, self._path) from exc

    @contextmanager
    def _transaction(
        self, connection: sqlite3.Connection | None
    ) -> Iterator[sqlite3.Connection]:
        if connection is None:
            raise LocalProtocolError("the storage is closed")
        with self._mapped():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def load(self) -> list[bytes]:
        """Return every stored entry.

        Raises:
            IntegrityError: the database or a row is damaged.
        """
        with self._transaction(self._entries) as db:
            rows = db.execute("SELECT id, raw FROM entry").fetchall()
        for entry_id, raw in rows:
            if digest(raw) != entry_id:
                raise _corrupt(self._path, "an entry does not match its hash")
        return [raw for _, raw in rows]

    def write(
        self,
        upserts: Sequence[Entry],
        deletes: Sequence[Slot],
        evidence: Sequence[tuple[Entry, Entry]] = (),
    ) -> None:
        """Commit entries and deletions in one transaction."""
        with self._transaction(self._entries) as db:
            db.executemany("DELETE FROM entry WHERE key = ? AND author = ?", deletes)
            db.executemany(
                "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)",
                [(e.key, e.author, e.id, e.raw) for e in upserts],
            )
            if evidence:
                db.executemany(
                    "INSERT OR REPLACE INTO evidence VALUES (?, ?, ?)",
                    [(max(a.id, b.id), a.raw, b.raw) for a, b in evidence],
                )
                db.execute(
                    "DELETE FROM evidence WHERE id NOT IN"
                    " (SELECT id FROM evidence LIMIT ?)",
                    (_MAX_EVIDENCE_ROWS,),
                )

    def load_evidence(self) -> list[tuple[bytes, bytes]]:
        """Return the raw pairs of equivocations kept."""
        with self._transaction(self._entries) as db:
            return [
                (one, other)
                for one, other in db.execute("SELECT one, other FROM evidence")
            ]

    def high_water(self) -> int:
        """Return the clock's mark, 0 on a fresh disk."""
        with self._transaction(self._durable) as db:
            row = db.execute("SELECT value FROM meta WHERE name = 'clock'").fetchone()
        return int(row[0]) if row else 0

    def save_high_water(self, mark: int) -> None:
        """Have a mark of at least ``mark`` on disk (FULL sync)."""
        with self._transaction(self._durable) as db:
            db.execute(
                "INSERT INTO meta VALUES ('clock', ?) ON CONFLICT (name)"
                " DO UPDATE SET value = max(value, excluded.value)",
                (mark,),
            )

    def save_promise(self, job: str, counter: int, blob: bytes) -> None:
        """Have the promise on disk (FULL sync); see :class:`Storage`."""
        with self._transaction(self._durable) as db:
            row = db.execute(
                "SELECT counter FROM promise WHERE job = ?", (job,)
            ).fetchone()
            check_promise(job, counter, row[0] if row else None)
            db.execute(
                "INSERT OR REPLACE INTO promise VALUES (?, ?, ?, ?)",
                (job, counter, digest(blob), blob),
            )

    def forget_promises(self, jobs: frozenset[str]) -> None:
        """Hold nothing of ``jobs`` (FULL sync)."""
        with self._transaction(self._durable) as db:
            rows = [(job,) for job in jobs]
            db.executemany("DELETE FROM promise WHERE job = ?", rows)

    def load_promises(self) -> dict[str, Promise]:
        """Return the promises by job.

        Raises:
            IntegrityError: one does not match its hash.
        """
        with self._transaction(self._durable) as db:
            rows = db.execute("SELECT job, counter, hash, blob FROM promise").fetchall()
        for _, _, hash_, blob in rows:
            if digest(blob) != hash_:
                raise _corrupt(self._path, "a promise does not match its hash")
        return {job: Promise(counter, h, blob) for job, counter, h, blob in rows}

    def close(self) -> None:
        """Close both connections; a second call does nothing."""
        for connection in (self._entries, self._durable):
            if connection is not None:
                connection.close()
        self._entries = self._durable = None


def check_promise(job: str, counter: int, held: int | None) -> None:
    """Raise unless ``counter`` may follow the one ``held``.

    The same counter may be saved again: what is known beside the promise grows.

    Raises:
        LocalProtocolError: a higher counter is promised already.
    """
    if held is not None and counter < held:
        raise LocalProtocolError(
            f"job {job}: promised {held} already, asked to promise {counter}"
        )
