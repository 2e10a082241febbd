"""State stays bounded: after very many updates, restarts, lies and strangers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from crdt_store.clock import RESERVE_SECONDS
from crdt_store.commit_service import merged
from crdt_store.entry import decode_entry_untrusted, sign_entry
from crdt_store.outcome import Changes, Outcome
from crdt_store.replica import Replica
from crdt_store.slots import MAX_EVIDENCE
from crdt_store.storage import SqliteStorage
from tests.crdt_store.conftest import key_of

WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1
UPDATES = 100_000 if WHOLE else 4_000
RESTARTS = 10_000 if WHOLE else 60
BATCH = 50
"""Updates in one transaction, about as the daemon commits them."""


def disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def save(storage: SqliteStorage, replica: Replica) -> None:
    changes = replica.take_changes()
    storage.write(
        tuple(changes.upserts.values()), tuple(changes.deletes), changes.evidence
    )


def heap_sizes(replica: Replica) -> Iterator[int]:
    """Yield the size of every container that updates could fill."""
    for part in (replica, replica.slots, replica.authority):
        for value in vars(part).values():
            if isinstance(value, (dict, list, set)):
                yield len(value)
    yield len(replica.index(authority=False))


@pytest.mark.slow
def test_100_000_updates_leave_what_the_last_ones_wrote(world, tmp_path) -> None:
    signer, path = world.workers[0], tmp_path / "db"
    replica = world.replica(signer)
    with closing(SqliteStorage(path)) as storage:
        save(storage, replica)
        largest = 0
        for number in range(UPDATES):
            key = f"j/{number % BATCH}/st"
            now = world.now + number
            entry = replica.sign(signer, key, bytes(100), 3600, now)
            replica.apply(entry, now)
            if number % BATCH == BATCH - 1:
                replica.tick(now)
                save(storage, replica)
                largest = max(largest, disk_bytes(path))
        held = BATCH + len(world.authority())
        assert len(replica.slots) == held
        assert max(heap_sizes(replica)) <= 2 * held + 1100  # deadlines, with slack
        assert largest <= 10 << 20  # the log, twice its limit at most, and the rest
        replica.tick(world.now + 2 * UPDATES + 7200)
        save(storage, replica)
        assert len(replica.slots) == len(world.authority())
        assert storage.load() == []  # the founding entries were never written here
        replica.check_integrity()
    assert disk_bytes(path) <= 1 << 20


def test_a_disk_full_of_expired_entries_shrinks_at_the_next_start(
    world, tmp_path
) -> None:
    path = tmp_path / "db"
    with closing(SqliteStorage(path)) as storage:
        many = [world.entry(world.owner, f"j/{n}/st", bytes(4000)) for n in range(2000)]
        storage.write(many, [])
        storage.write([], [entry.slot for entry in many[10:]])
    before = disk_bytes(path)
    with closing(SqliteStorage(path)) as storage:
        assert len(storage.load()) == 10
    assert disk_bytes(path) < before / 4


@pytest.mark.slow
def test_10_000_restarts_change_nothing_but_the_clock(world, tmp_path) -> None:
    signer, path, sizes = world.workers[0], tmp_path / "db", []
    now, last = world.now, 0
    with closing(SqliteStorage(path)) as storage:
        storage.write([decode_entry_untrusted(raw) for raw in world.authority()], [])
    for number in range(RESTARTS):
        with closing(SqliteStorage(path)) as storage:
            replica = Replica(
                world.mesh, signer.public_key, clock_mark=storage.high_water()
            )
            replica.restore(storage.load(), now)
            key = f"m/{signer.peer_id}"
            entry = replica.sign(signer, key, number.to_bytes(4, "big"), 86400, now)
            assert entry.hlc > last
            last = entry.hlc
            mark = replica.clock.mark_to_save(now)
            if mark is not None:
                storage.save_high_water(mark)
            replica.apply(entry, now)
            save(storage, replica)
        # the wall hardly moves, and sometimes backwards
        now += 0.01 if number % 10 else -0.05
        assert entry.seconds <= world.now + RESERVE_SECONDS + 1 + number * 0.02
        sizes.append(disk_bytes(path))
        assert len(replica.slots) == 1 + len(world.authority())
    assert max(sizes) < 200_000


def test_a_liar_gets_one_place_per_slot_and_few_in_all(world) -> None:
    replica, liar = world.replica(), world.workers[0]
    for number in range(MAX_EVIDENCE + 20):
        for value in (b"a", b"b", b"c", b"a", b"b"):
            entry = world.entry(liar, f"j/{number}/st", value)
            replica.ingest_untrusted(entry.raw, world.now)
    assert len(replica.slots.evidence()) == MAX_EVIDENCE
    assert len(replica.take_changes().evidence) == MAX_EVIDENCE + 20


def test_a_disk_that_refuses_does_not_pile_up_evidence(world) -> None:
    pair = (world.entry(world.owner, "a/b/c"), world.entry(world.owner, "a/b/c", b"w"))
    waiting = Changes()
    for _ in range(20):
        waiting = merged(waiting, Changes(evidence=[pair] * 50))
    assert len(waiting.evidence) == MAX_EVIDENCE


def test_strangers_without_number_leave_no_trace(world) -> None:
    replica = world.replica()
    before = list(heap_sizes(replica))
    for number in range(1000, 1300):
        entry = world.entry(key_of(number), "j/a/st")
        assert replica.ingest_untrusted(entry.raw, world.now) is Outcome.UNAUTHORISED
    assert list(heap_sizes(replica)) == before


def test_the_future_has_a_bounded_waiting_room(world) -> None:
    replica, now = world.replica(), world.now
    for number in range(1200):
        entry = sign_entry(
            world.workers[number % 4],
            world.mesh.id,
            f"j/{number}/st",
            world.entry(world.owner, "j/x/st", at=now + 1e6).hlc,
            0,
            b"",
        )
        assert replica.ingest_untrusted(entry.raw, now) is Outcome.HELD
    assert max(heap_sizes(replica)) <= 1024
