"""Batching and pacing of pushes, against what was added."""

from __future__ import annotations

import itertools
from functools import lru_cache

from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.config import StoreConfig
from crdt_store.messages import MAX_PUSH_BYTES, PUSH
from crdt_store.push_queue import PushQueue


def taken(queue: PushQueue, now: float) -> tuple[bytes, ...]:
    payload = queue.take(now)
    assert payload is not None
    assert len(payload) <= MAX_PUSH_BYTES + 8
    return PUSH.decode_untrusted(payload).entries


def test_what_is_written_within_50_ms_leaves_together(world) -> None:
    queue = PushQueue(StoreConfig())
    one, two = (world.entry(world.owner, f"j/{n}/st") for n in range(2))
    assert queue.next_at is None
    assert queue.add(one, 10.0)
    assert queue.add(two, 10.04)
    assert queue.next_at == 10.05
    assert queue.take(10.04) is None
    assert taken(queue, 10.05) == (one.raw, two.raw)
    assert queue.next_at is None
    assert queue.add(one, 10.06)
    assert queue.next_at == 10.25


def test_the_last_write_of_a_slot_is_sent_and_goes_to_the_end(world) -> None:
    queue = PushQueue(StoreConfig())
    old, other = (world.entry(world.owner, f"j/{n}/st") for n in range(2))
    new = world.entry(world.owner, "j/0/st", b"new", at=world.now + 1)
    for entry in (old, other, new):
        queue.add(entry, 0.0)
    assert taken(queue, 1.0) == (other.raw, new.raw)


def test_a_full_queue_refuses_new_slots_only(world) -> None:
    queue = PushQueue(StoreConfig(max_push_backlog=2))
    entries = [world.entry(world.owner, f"j/{n}/st") for n in range(3)]
    assert [queue.add(e, 0.0) for e in entries] == [True, True, False]
    assert queue.add(entries[0], 0.0)
    assert len(queue) == 2


@lru_cache(maxsize=1)
def some_entries(make_world):
    world = make_world()
    return [
        world.entry(world.owner, f"j/{n % 30}/st", bytes(n * 97 % 4096), at=world.now)
        for n in range(60)
    ]


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 59), st.floats(0, 0.3)), max_size=120),
)
def test_never_above_the_pace_and_nothing_is_forgotten(make_world, steps) -> None:
    entries = some_entries(make_world)
    queue, now = PushQueue(StoreConfig()), 0.0
    sent_at: list[float] = []
    sent: dict[str, bytes] = {}
    latest: dict[str, bytes] = {}

    def take() -> None:
        for entry in taken(queue, now):
            sent[entry] = entry
        sent_at.append(now)

    for number, pause in steps:
        while queue.next_at is not None and queue.next_at <= now + pause:
            now = max(now, queue.next_at)
            take()
        now += pause
        assert queue.add(entries[number], now)
        latest[entries[number].key] = entries[number].raw
    while queue.next_at is not None:
        now = max(now, queue.next_at)
        take()
    assert set(latest.values()) <= set(sent.values())
    assert all(b - a >= 0.2 - 1e-9 for a, b in itertools.pairwise(sent_at))
