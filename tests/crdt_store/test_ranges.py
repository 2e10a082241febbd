"""The range index against the simple twin: a sorted list."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.ranges import END, RangeIndex
from fabric.core.digest import digest


def test_incremental_equals_rebuilt_at_any_size() -> None:
    rng = random.Random(3)
    index, twin = RangeIndex(), {}
    for n in range(3000):
        if twin and rng.random() < 0.3:
            at, entry_id = twin.pop(rng.choice(list(twin)))
            index.remove(at, entry_id)
        else:
            item = (rng.randrange(END), digest(n.to_bytes(4, "big")))
            twin[n] = item
            index.add(*item)
    index.check_integrity()
    items = sorted(twin.values())
    rebuilt = RangeIndex()
    for item in items:
        rebuilt.add(*item)
    for _ in range(50):
        low, high = sorted(rng.sample(range(END), 2))
        inside = [item for item in items if low <= item[0] < high]
        assert index.items(low, high) == inside
        assert index.count(low, high) == len(inside)
        assert index.fingerprint(low, high) == rebuilt.fingerprint(low, high)


PLACES = st.integers(0, 40)


@settings(max_examples=50)
@given(st.lists(PLACES, max_size=60), PLACES, st.integers(1, 41))
def test_cuts_tile_the_range_even_when_positions_collide(places, low, width) -> None:
    index = RangeIndex()
    for n, at in enumerate(places):
        index.add(at, digest(bytes([n])))
    high = low + width
    bounds = index.cuts(low, high, 16)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == high
    assert bounds[0] > low
    assert len(bounds) <= 16
    starts = [low, *bounds[:-1]]
    parts = [index.items(a, b) for a, b in zip(starts, bounds, strict=True)]
    assert [item for part in parts for item in part] == index.items(low, high)


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_fingerprints_tell_sets_apart(one, other) -> None:
    indexes = []
    for numbers in (one, other):
        index = RangeIndex()
        for n in numbers:
            index.add(n * 1000, digest(bytes([n])))
        indexes.append(index)
    same = indexes[0].fingerprint() == indexes[1].fingerprint()
    assert same == (one == other)


def test_ids_that_add_up_alike_do_not_pass_for_one_another() -> None:
    """What an author could grind while sums were of the ids themselves."""
    one, other = RangeIndex(), RangeIndex()
    low, high = digest(b"low")[:31] + b"\x05", digest(b"high")[:31] + b"\x05"
    less, more = low[:31] + b"\x04", high[:31] + b"\x06"
    for index, ids in ((one, (low, high)), (other, (less, more))):
        for place, entry_id in enumerate(ids):
            index.add(place, entry_id)
    assert one.fingerprint() != other.fingerprint()
    assert one.whole_digest() != other.whole_digest()


def test_a_fingerprint_is_another_with_another_salt() -> None:
    index = RangeIndex()
    index.add(1, digest(b"x"))
    assert index.fingerprint(salt=b"a" * 8) != index.fingerprint(salt=b"b" * 8)
    assert index.whole_digest() == index.whole_digest()
