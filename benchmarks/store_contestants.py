"""The same operations on our replica, a pycrdt document and a loro document.

Each holds one map; a write sets one key to 60 bytes. Ours signs every write and checks
every signature that arrives; the documents trust whoever sends, so what they save is
what trust is worth. Their interface here is the least that the cases need.

    python -m benchmarks.store_contestants KIND write|open PATH [NUM]

writes NUM entries to PATH, or opens it and prints what that cost, in a process of its
own so that memory can be told.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from crdt_store.clock import stamp
from crdt_store.entry import Entry, sign_entry
from crdt_store.grants import CODEC, GRANT_PREFIX, Grant, create_mesh
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from crdt_store.replica import Replica
from crdt_store.roles import Role
from crdt_store.storage import SqliteStorage
from fabric.core.signing import Ed25519Signer

NOW = 1_700_000_000.0
VALUE_BYTES = 60
NUM_WRITERS = 10
DAY_SECONDS = 86400


class Contestant(Protocol):
    """One replica of one kind."""

    def write(self, number: int) -> bytes:
        """Set key ``number``; return what others must be told."""
        ...

    def take(self, updates: list[bytes]) -> None:
        """Take in what another wrote."""
        ...

    def sync(self, other: Contestant) -> Iterator[int]:
        """Reconcile with ``other``; yield the bytes of each round trip."""
        ...

    def digest(self) -> object:
        """Return what is equal on replicas that hold the same."""
        ...

    def save(self, path: Path) -> None:
        """Keep everything on disk."""
        ...


def _signer(number: int) -> Ed25519Signer:
    return Ed25519Signer(number.to_bytes(32, "big"))


class _Unsigned(Ed25519Signer):
    """Signs nothing: for entries that come from disk, where nobody checks."""

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        """Return zeroes."""
        return bytes(64)


def _value(number: int) -> bytes:
    return number.to_bytes(8, "big") * (VALUE_BYTES // 8) + bytes(VALUE_BYTES % 8)


class Slots:
    """Ours."""

    kind = "peerfabric"

    def __init__(self, writer: int = 0, *, found: bool = True) -> None:
        owner = _signer(100)
        self.mesh, founding = create_mesh("bench", _signer(99), owner.peer_id, NOW - 9)
        self.signer = _signer(writer + 1)
        self.founding = [founding, *(self._grant(owner, n) for n in range(NUM_WRITERS))]
        self.replica = Replica(
            self.mesh,
            self.signer.public_key,
            max_entries=10**7,
            max_entries_per_author=10**7,
        )
        if found:
            self.replica.restore([entry.raw for entry in self.founding], NOW)

    def _grant(self, owner: Ed25519Signer, number: int) -> Entry:
        key = GRANT_PREFIX + _signer(number + 1).peer_id
        record = CODEC.encode(Grant(Role.WORKER))
        return sign_entry(owner, self.mesh.id, key, stamp(NOW - 8), 0, record)

    def write(self, number: int) -> bytes:
        """Sign and apply one entry."""
        key = f"j/{number}/st"
        entry = self.replica.sign(self.signer, key, _value(number), DAY_SECONDS, NOW)
        self.replica.apply(entry, NOW)
        return entry.raw

    def take(self, updates: list[bytes]) -> None:
        """Judge entries, signatures included."""
        self.replica.ingest_batch_untrusted(updates, NOW)

    def sync(self, other: Slots) -> Iterator[int]:
        """Reconcile by ranges."""
        session = Session(self.replica, os.urandom(8))
        while (data := session.next_request()) is not None:
            request = parse_request_untrusted(data)
            other.take(list(getattr(request, "entries", ())))
            response = answer(other.replica, request)
            yield len(data) + len(response)
            self.take(list(session.receive_untrusted(response)))

    def digest(self) -> str:
        """Return the state hash."""
        return self.replica.state_hash()

    def save(self, path: Path) -> None:
        """Write what is new to SQLite."""
        storage = SqliteStorage(path)
        storage.write(
            [*self.founding, *self.replica.take_changes().upserts.values()], []
        )
        storage.close()

    @classmethod
    def open(cls, path: Path) -> Slots:
        """Start from SQLite."""
        opened = cls(found=False)
        storage = SqliteStorage(path)
        opened.replica.restore(storage.load(), NOW)
        storage.close()
        return opened

    @classmethod
    def fill(cls, path: Path, num: int) -> None:
        """Write ``num`` entries that only a restart will read."""
        slots = cls()
        signers = [_Unsigned((n + 1).to_bytes(32, "big")) for n in range(NUM_WRITERS)]
        for number in range(num):
            slots.signer = signers[number % NUM_WRITERS]
            slots.write(number)
        slots.save(path)


class YDoc:
    """A pycrdt document."""

    kind = "pycrdt"

    def __init__(self, writer: int = 0) -> None:
        import pycrdt

        self._doc = pycrdt.Doc(client_id=writer + 1)
        self._map = self._doc.get("m", type=pycrdt.Map)
        self._updates: list[bytes] = []
        self._kept = self._doc.observe(lambda event: self._updates.append(event.update))

    def write(self, number: int) -> bytes:
        """Set one key."""
        self._map[f"j/{number}/st"] = _value(number)
        return self._updates.pop()

    def take(self, updates: list[bytes]) -> None:
        """Apply each update."""
        for update in updates:
            self._doc.apply_update(update)
        self._updates.clear()

    def sync(self, other: YDoc) -> Iterator[int]:
        """Exchange state vectors and differences."""
        ours = self._doc.get_state()
        theirs, update = other._doc.get_state(), other._doc.get_update(ours)
        yield len(ours) + len(theirs) + len(update)
        self.take([update])
        back = self._doc.get_update(theirs)
        if len(back) > 2:  # b"\0\0" is nothing
            yield len(back)
            other.take([back])

    def digest(self) -> object:
        """Return the contents."""
        return dict(self._map.to_py() or {})

    def save(self, path: Path) -> None:
        """Write the whole document as one update."""
        path.write_bytes(self._doc.get_update())

    @classmethod
    def open(cls, path: Path) -> YDoc:
        """Start from one update."""
        opened = cls()
        opened.take([path.read_bytes()])
        return opened

    @classmethod
    def fill(cls, path: Path, num: int) -> None:
        """Write a document of ``num`` keys."""
        _fill_document(cls, path, num)


class LoroDoc:
    """A loro document."""

    kind = "loro"

    def __init__(self, writer: int = 0) -> None:
        import loro

        self._loro = loro
        self._doc = loro.LoroDoc()
        self._doc.peer_id = writer + 1
        self._map = self._doc.get_map("m")

    def write(self, number: int) -> bytes:
        """Set one key."""
        before = self._doc.oplog_vv
        self._map.insert(f"j/{number}/st", _value(number))
        self._doc.commit()
        return self._since(before)

    def _since(self, seen) -> bytes:
        return self._doc.export(self._loro.ExportMode.Updates(seen))

    def take(self, updates: list[bytes]) -> None:
        """Import each update."""
        for update in updates:
            self._doc.import_(update)

    def sync(self, other: LoroDoc) -> Iterator[int]:
        """Exchange version vectors and differences."""
        ours, theirs = self._doc.oplog_vv, other._doc.oplog_vv
        update = other._since(ours)
        yield len(ours.encode()) + len(theirs.encode()) + len(update)
        self.take([update])
        if self._doc.oplog_vv != theirs:
            back = self._since(theirs)
            yield len(back)
            other.take([back])

    def digest(self) -> object:
        """Return the contents."""
        return self._doc.get_deep_value()

    def save(self, path: Path) -> None:
        """Write a snapshot."""
        path.write_bytes(self._doc.export(self._loro.ExportMode.Snapshot()))

    @classmethod
    def open(cls, path: Path) -> LoroDoc:
        """Start from a snapshot, and read it: loro decodes when first asked."""
        opened = cls()
        opened.take([path.read_bytes()])
        opened.digest()
        return opened

    @classmethod
    def fill(cls, path: Path, num: int) -> None:
        """Write a document of ``num`` keys."""
        _fill_document(cls, path, num)


def _fill_document(kind, path: Path, num: int) -> None:
    writers = [kind(n) for n in range(NUM_WRITERS)]
    for number in range(num):
        writers[number % NUM_WRITERS].write(number)
    for writer in writers[1:]:
        for _ in writers[0].sync(writer):
            pass
    writers[0].save(path)


KINDS = {contestant.kind: contestant for contestant in (Slots, YDoc, LoroDoc)}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _measure_open(kind, path: Path) -> dict[str, float]:
    kind()  # its imports are not what is measured
    gc.collect()
    before, started = _resident(), time.process_time()
    opened = kind.open(path)
    seconds = time.process_time() - started
    gc.collect()
    grown = _resident() - before
    del opened
    return {"seconds": seconds, "resident_bytes": grown}


if __name__ == "__main__":
    chosen, verb, where = KINDS[sys.argv[1]], sys.argv[2], Path(sys.argv[3])
    if verb == "write":
        chosen.fill(where, int(sys.argv[4]))
    else:
        print(json.dumps(_measure_open(chosen, where)))
