"""The laws: any order, any repetition, any attack, any partition; same end, no loss."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.clock import MAX_FUTURE_SECONDS, stamp
from crdt_store.outcome import Outcome
from crdt_store.replica import Replica

KEYS = [f"j/{n}/st" for n in range(4)]


def state(replica: Replica) -> dict:
    return {entry.slot: entry.id for entry in replica.slots}


def view(replica: Replica) -> tuple:
    trees = (replica.index(authority=a).fingerprint() for a in (True, False))
    return (*trees, state(replica))


WRITES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 5),
        st.sampled_from([b"a", b"b", b"c"]),
    ),
    max_size=12,
)


def entries_of(world, writes) -> list[bytes]:
    return [
        world.entry(
            world.workers[w], KEYS[k], value, hlc=stamp(world.now - 9) + tick
        ).raw
        for w, k, tick, value in writes
    ]


@settings(max_examples=25, deadline=None)
@given(writes=WRITES, rng=st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(make_world, writes, rng) -> None:
    world = make_world()
    one, other = world.replica(), world.replica()
    raws = entries_of(world, writes)
    for raw in raws:
        one.ingest_untrusted(raw, world.now)
    shuffled = raws * 2
    rng.shuffle(shuffled)
    other.ingest_batch_untrusted(shuffled, world.now)
    assert view(one) == view(other)
    one.check_integrity()


@settings(max_examples=5, deadline=None)
@given(a=WRITES, b=WRITES, c=WRITES)
def test_merge_is_associative_commutative_and_idempotent(make_world, a, b, c) -> None:
    world = make_world()
    parts = [entries_of(world, part) for part in (a, b, c)]

    def merged(order, *, twice=False) -> dict:
        replica = world.replica()
        for index in order:
            other = world.replica()
            other.ingest_batch_untrusted(parts[index], world.now)
            for _ in range(2 if twice else 1):
                replica.ingest_batch_untrusted([e.raw for e in other.slots], world.now)
        return state(replica)

    orders = list(itertools.permutations(range(3)))
    assert all(merged(order) == merged(orders[0]) for order in orders[1:])
    assert merged(orders[0], twice=True) == merged(orders[0])


def test_equivocation_is_kept_as_evidence_and_converges(world) -> None:
    hlc = stamp(world.now)
    pair = [world.entry(world.workers[0], KEYS[0], v, hlc=hlc) for v in (b"a", b"b")]
    one, other = world.replica(), world.replica()
    for replica, order in ((one, pair), (other, pair[::-1])):
        outcomes = {replica.ingest_untrusted(e.raw, world.now) for e in order}
        assert Outcome.ACCEPTED in outcomes
        ((first, second),) = replica.slots.evidence()
        assert {first.id, second.id} == {e.id for e in pair}
        assert replica.take_changes().evidence
    assert state(one) == state(other)
    forged = bytearray(pair[0].raw)
    forged[3] ^= 1
    assert one.ingest_untrusted(bytes(forged), world.now) is Outcome.BAD_SIGNATURE


def test_an_entry_from_the_future_is_held_until_due(world) -> None:
    replica = world.replica()
    early = world.entry(
        world.workers[0], KEYS[0], at=world.now + MAX_FUTURE_SECONDS + 10
    )
    before = view(replica)
    assert replica.ingest_untrusted(early.raw, world.now) is Outcome.HELD
    replica.tick(world.now + 5)
    assert view(replica) == before
    replica.tick(world.now + 11)
    assert replica.slots.get(early.slot) == early


def test_expired_entries_leave_fade_first_and_do_not_come_back(world) -> None:
    replica, other = world.replica(), world.replica()
    entry = world.entry(world.workers[0], KEYS[0], ttl=1000)
    empty = replica.index(authority=False).fingerprint()
    for each in (replica, other):
        assert each.ingest_untrusted(entry.raw, world.now) is Outcome.ACCEPTED
    replica.tick(world.now + 941)
    assert replica.index(authority=False).fingerprint() == empty
    assert replica.slots.get(entry.slot) == entry
    assert replica.raw(entry.id) is None
    # a partner whose clock is behind still offers it: known, so not taken again
    assert replica.ingest_untrusted(entry.raw, world.now + 941) is Outcome.DUPLICATE
    replica.tick(world.now + 1000)
    assert replica.slots.get(entry.slot) is None
    assert replica.ingest_untrusted(entry.raw, world.now + 1000) is Outcome.EXPIRED
    replica.check_integrity()


def test_a_short_lived_write_does_not_resurrect_the_long_lived_one(world) -> None:
    signer = world.workers[0]
    writer, partitioned = world.replica(signer), world.replica()
    long = writer.sign(signer, KEYS[0], b"long", 1000, world.now)
    writer.apply(long, world.now)
    partitioned.apply(long, world.now)
    short = writer.sign(signer, KEYS[0], b"short", 10, world.now + 1)
    assert short.expires_at >= long.expires_at
    writer.apply(short, world.now + 1)
    late = world.now + 500
    writer.tick(late)
    assert writer.ingest_untrusted(long.raw, late) is Outcome.OLD


def test_bounds_hold_against_one_author_and_against_all(world) -> None:
    replica = world.replica(max_entries=20, max_entries_per_author=5)
    outcomes = [
        replica.ingest_untrusted(
            world.entry(world.workers[w], f"j/{n}/st").raw, world.now
        )
        for w in range(4)
        for n in range(7)
    ]
    assert outcomes.count(Outcome.FULL) == 28 - (20 - 6)
    again = world.entry(world.workers[0], "j/0/st", b"newer", at=world.now + 1)
    assert replica.ingest_untrusted(again.raw, world.now) is Outcome.ACCEPTED


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_door_never_raises_and_refusals_change_nothing(make_world, data) -> None:
    world = make_world()
    replica = world.replica()
    valid = world.entry(world.workers[0], KEYS[0]).raw
    raw = bytearray(data.draw(st.one_of(st.binary(max_size=300), st.just(valid))))
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at : at + data.draw(st.integers(0, 2))] = data.draw(
                st.binary(max_size=3)
            )
    before = view(replica)
    outcome = replica.ingest_untrusted(bytes(raw), world.now)
    assert (outcome is Outcome.ACCEPTED) == (bytes(raw) == valid)
    if outcome is not Outcome.ACCEPTED:
        assert view(replica) == before
    replica.check_integrity()


def test_a_restart_with_the_clock_set_back_loses_nothing_on_disk(world) -> None:
    signer = world.workers[0]
    replica = world.replica(signer)
    entry = replica.sign(signer, KEYS[0], b"acknowledged", 0, world.now)
    raws = [*world.authority(), entry.raw]
    early = world.now - 10 * MAX_FUTURE_SECONDS
    again = Replica(world.mesh, signer.public_key, clock_mark=entry.hlc)
    again.restore(raws, early)
    assert again.slots.get(entry.slot) == entry
    assert not again.take_changes().deletes
