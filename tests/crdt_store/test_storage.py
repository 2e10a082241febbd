"""The disk: restart, refusal, damage, and kill -9 of a real process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from crdt_store.entry import decode_entry_untrusted
from crdt_store.memory_storage import MemoryStorage
from crdt_store.storage import SqliteStorage, lock_data_folder
from fabric.core.errors import (
    ConfigError,
    IntegrityError,
    LocalProtocolError,
    ResourceExhausted,
)

ROOT = Path(__file__).parents[2]
WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1


@pytest.fixture(params=["sqlite", "memory"])
def reopen(request, tmp_path):
    """A function that returns the same storage, as if after a restart."""
    memory = MemoryStorage()
    opened: list = []

    def make():
        for storage in opened:
            storage.close()
        if request.param == "memory":
            return memory
        opened.append(SqliteStorage(tmp_path / "store.sqlite3"))
        return opened[-1]

    yield make
    for storage in opened:
        storage.close()


def test_what_was_written_is_there_after_a_restart(world, reopen) -> None:
    storage = reopen()
    one, two = (world.entry(world.owner, f"j/{n}/st") for n in range(2))
    storage.write([one, two], [])
    newer = world.entry(world.owner, "j/0/st", b"newer", at=world.now + 1)
    storage.write([newer], [two.slot])
    assert reopen().load() == [newer.raw]


def test_marks_and_promises_only_grow(reopen) -> None:
    storage = reopen()
    assert storage.high_water() == 0
    storage.save_high_water(1 << 60)
    storage.save_high_water(5)
    storage.save_promise("job", 4, b"four")
    storage.save_promise("job", 4, b"four, committed")
    storage.save_promise("other", 1, b"one")
    with pytest.raises(LocalProtocolError):
        storage.save_promise("job", 3, b"three")
    storage = reopen()
    assert storage.high_water() == 1 << 60
    promises = storage.load_promises()
    assert promises["job"].counter == 4
    assert promises["job"].blob == b"four, committed"
    assert promises["other"].counter == 1
    storage.forget_promises(frozenset({"job", "never heard of"}))
    assert list(storage.load_promises()) == list(reopen().load_promises()) == ["other"]


def test_the_same_call_may_delete_a_slot_and_write_it(world, reopen) -> None:
    storage = reopen()
    old = world.entry(world.owner, "j/0/st")
    new = world.entry(world.owner, "j/0/st", b"new", at=world.now + 1)
    storage.write([old], [])
    storage.write([new], [old.slot])
    storage.write([], [("j/never/st", world.owner.public_key)])
    assert reopen().load() == [new.raw]


def test_what_is_loaded_is_what_a_replica_restores(world, reopen) -> None:
    storage, replica = reopen(), world.replica()
    written = [world.entry(w, f"j/{n}/st") for n, w in enumerate(world.workers)]
    founding = [decode_entry_untrusted(raw) for raw in world.authority()]
    storage.write([*founding, *written], [])
    replica.ingest_batch_untrusted([e.raw for e in written], world.now)
    again = world.replica()
    again.restore(reopen().load(), world.now)
    assert again.state_hash() == replica.state_hash()


def test_evidence_is_kept(world, tmp_path) -> None:
    storage = SqliteStorage(tmp_path / "db")
    pair = (world.entry(world.owner, "a/b/c"), world.entry(world.owner, "a/b/c", b"w"))
    storage.write([], [], [pair])
    storage.write([], [], [pair])
    assert storage.load_evidence() == [(pair[0].raw, pair[1].raw)]
    storage.close()


def test_a_closed_storage_refuses(tmp_path) -> None:
    storage = SqliteStorage(tmp_path / "db")
    storage.close()
    storage.close()
    with pytest.raises(LocalProtocolError):
        storage.load()


def test_a_full_disk_is_said_and_nothing_acknowledged_is_lost(world, tmp_path) -> None:
    storage = SqliteStorage(tmp_path / "db")
    kept = world.entry(world.owner, "j/0/st")
    storage.write([kept], [])
    pages = storage._entries.execute("PRAGMA page_count").fetchone()[0]
    storage._entries.execute(f"PRAGMA max_page_count = {pages + 2}")
    many = [world.entry(world.owner, f"j/{n}/st", bytes(4000)) for n in range(1, 30)]
    with pytest.raises(ResourceExhausted) as refused:
        storage.write(many, [kept.slot])
    assert refused.value.code == "E_DISK_FULL"
    assert storage.load() == [kept.raw]
    storage._entries.execute("PRAGMA max_page_count = 100000")
    storage.write(many, [])
    assert len(storage.load()) == 30
    storage.close()


def read_all(path: Path) -> None:
    with closing(SqliteStorage(path)) as storage:
        storage.load()
        storage.load_promises()


@pytest.mark.parametrize("damage", ["header", "row", "promise"])
def test_a_damaged_database_is_an_integrity_error_with_advice(
    world, tmp_path, damage
) -> None:
    path = tmp_path / "db"
    storage = SqliteStorage(path)
    storage.write([world.entry(world.owner, "j/0/st")], [])
    storage.save_promise("job", 1, b"one")
    storage.close()
    if damage == "header":
        path.write_bytes(b"not a database" + path.read_bytes()[14:])
    else:
        with sqlite3.connect(path) as db:
            table, column = {"row": ("entry", "raw"), "promise": ("promise", "blob")}[
                damage
            ]
            db.execute(f"UPDATE {table} SET {column} = x'00'")
        db.close()
    with pytest.raises(IntegrityError) as damaged:
        read_all(path)
    assert damaged.value.code == "E_STORE_CORRUPT"
    assert damaged.value.next_step


def test_a_folder_that_cannot_be_used_is_a_config_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot use"),
        lock_data_folder(tmp_path / "file" / "data"),
    ):
        pass
    with pytest.raises(ConfigError):
        SqliteStorage(tmp_path / "missing" / "db")


def test_a_data_folder_has_one_user_at_a_time(tmp_path) -> None:
    with lock_data_folder(tmp_path):
        with (
            pytest.raises(ConfigError, match="in use") as busy,
            lock_data_folder(tmp_path),
        ):
            pass
        assert busy.value.next_step
    with lock_data_folder(tmp_path):
        pass


WRITER = """
import sys
import trio
from pathlib import Path
from crdt_store.config import StoreConfig
from crdt_store.grants import create_mesh
from crdt_store.service import open_store
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from time import time

class Nobody:
    def register_async(self, method, handler): pass
    def connected(self): return frozenset()
    def lost(self): return trio.open_memory_channel(1)[1]
    async def publish(self, topic, payload): await trio.lowlevel.checkpoint()
    def subscribe(self, topic): return trio.open_memory_channel(1)[1]

async def main(folder):
    root, owner = Ed25519Signer(bytes(32)), Ed25519Signer(bytes([1]) * 32)
    mesh, founding = create_mesh("lab", root, owner.peer_id, time() - 10)
    async with open_store(StoreConfig(commit_batch_seconds=0.001), folder, owner, mesh,
                          Nobody(), Nobody(), time, Counters()) as store:
        store.ingest_authority_untrusted([founding.raw])
        async def write(lane):
            for n in range(1_000_000):
                entry = await store.put(f"j/{lane}-{n}/st", bytes(50), 0)
                print(entry.raw.hex(), flush=True)
                if n % 10 == 0:
                    await store.promises.save(f"job{lane}", n, b"x")
                    print("promise", lane, n, flush=True)
        async with trio.open_nursery() as nursery:
            for lane in range(8):
                nursery.start_soon(write, lane)

trio.run(main, Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(50 if WHOLE else 4))
def test_kill_9_loses_no_acknowledged_write(tmp_path, kill) -> None:
    acks_before_kill = 1 + kill * kill * 37 % 211  # early, late, and anywhere between
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = [process.stdout.readline() for _ in range(acks_before_kill)]
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.readlines()  # what it printed before it died
    process.stdout.close()
    process.wait(timeout=20)
    lines += [line for line in rest if line.endswith("\n")]
    acknowledged = {bytes.fromhex(x) for x in lines if not x.startswith("promise")}
    promised: dict[str, int] = {}
    for line in lines:
        if line.startswith("promise"):
            _, lane, n = line.split()
            promised[f"job{lane}"] = int(n)
    assert len(lines) >= acks_before_kill
    with lock_data_folder(tmp_path, "store.lock"):  # dropped with the process
        storage = SqliteStorage(tmp_path / "store.sqlite3")
        stored = set(storage.load())
        assert acknowledged <= stored
        for job, counter in promised.items():
            assert storage.load_promises()[job].counter >= counter
        newest = max(decode_entry_untrusted(raw).hlc for raw in acknowledged)
        assert storage.high_water() >= newest
        (verdict,) = storage._entries.execute("PRAGMA integrity_check").fetchone()
        assert verdict == "ok"
        storage.close()
