"""The laws: any order, any repetition, any attack, any partition; same end, no loss."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from crdt_store.clock import MAX_FUTURE_SECONDS, stamp
from crdt_store.entry import sign_entry
from crdt_store.grants import Mesh
from crdt_store.outcome import Outcome
from crdt_store.reconcile import Session, answer, parse_request_untrusted
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


FATES = st.sampled_from(["deliver", "dup", "drop"])
ATTACKS = st.sampled_from(
    [
        "forged",
        "flipped",
        "unauthorised",
        "foreign",
        "replayed",
        "future",
        "mesh",
        "garbage",
    ]
)
ONE_OF_4 = st.integers(0, 3)


class Mesh4(RuleBasedStateMachine):
    """Four replicas, a network that loses and repeats, cut sessions, nine attacks."""

    make_world = None

    @initialize()
    def found(self) -> None:
        self.world = type(self).make_world()
        self.replicas = [self.world.replica(w) for w in self.world.workers]
        self.flying: list[bytes] = []
        self.seen: list[bytes] = []
        self.acknowledged: dict[tuple, int] = {}
        self.sides = [0, 0, 0, 0]

    @rule(who=ONE_OF_4, key=ONE_OF_4, value=st.binary(max_size=3))
    def write(self, who, key, value) -> None:
        signer, now = self.world.workers[who], self.world.now
        replica = self.replicas[who]
        entry = replica.sign(signer, KEYS[key], value, 0, now)
        if entry.seconds > now + MAX_FUTURE_SECONDS:
            return  # the shell refuses: clock set back
        replica.apply(entry, now)
        self.acknowledged[entry.slot] = entry.hlc
        self.flying.append(entry.raw)
        self.seen.append(entry.raw)
        assert replica.slots.get(entry.slot) == entry

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds) -> None:
        self.world.now += seconds
        for replica in self.replicas:
            replica.tick(self.world.now)

    @rule(sides=st.lists(st.integers(0, 1), min_size=4, max_size=4))
    def partition(self, sides) -> None:
        self.sides = sides

    @precondition(lambda self: self.flying)
    @rule(
        to=ONE_OF_4,
        data=st.data(),
        fate=FATES,
    )
    def push(self, to, data, fate) -> None:
        at = data.draw(st.integers(0, len(self.flying) - 1))
        raw = self.flying[at]
        if fate != "drop":
            self.replicas[to].ingest_untrusted(raw, self.world.now)
        if fate != "dup":
            self.flying.pop(at)

    @rule(
        one=ONE_OF_4,
        other=ONE_OF_4,
        cut=st.none() | st.integers(1, 4),
    )
    def sync(self, one, other, cut) -> None:
        if one != other and self.sides[one] == self.sides[other]:
            self._sync(one, other, cut)

    def _sync(self, one, other, cut=None) -> None:
        a, b, now = self.replicas[one], self.replicas[other], self.world.now
        session = Session(a, bytes(8))
        while (data := session.next_request()) is not None:
            request = parse_request_untrusted(data)
            b.ingest_batch_untrusted(getattr(request, "entries", ()), now)
            if cut is not None and session.num_requests >= cut:
                return
            entries = session.receive_untrusted(answer(b, request))
            a.ingest_batch_untrusted(entries, now)

    @rule(
        to=ONE_OF_4,
        kind=ATTACKS,
        data=st.data(),
    )
    def attack(self, to, kind, data) -> None:
        world, replica = self.world, self.replicas[to]
        worker, victim = world.workers[0], world.workers[1]
        good = world.entry(worker, KEYS[0], b"evil").raw
        match kind:
            case "forged":
                raw = world.entry(world.stranger, KEYS[0]).raw
                raw = raw.replace(world.stranger.public_key, victim.public_key)
            case "flipped":
                at = data.draw(st.integers(0, 63))
                raw = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
            case "unauthorised":
                raw = world.entry(world.stranger, KEYS[0]).raw
            case "foreign":
                raw = world.entry(worker, f"m/{victim.peer_id}").raw
            case "replayed":
                raw = data.draw(st.sampled_from(self.seen or [b""]))
                entry_known = {e.raw for e in replica.slots}
                if raw not in entry_known:
                    return
            case "future":
                raw = world.entry(worker, KEYS[0], at=world.now + 1e7).raw
            case "mesh":
                other = Mesh("other", world.root.public_key).id
                hlc = stamp(world.now)
                raw = sign_entry(worker, other, KEYS[0], hlc, 0, b"").raw
            case _:
                raw = data.draw(st.binary(max_size=100))
        before = view(replica)
        assert replica.ingest_untrusted(raw, world.now) is not Outcome.ACCEPTED
        assert view(replica) == before

    @rule(to=st.lists(ONE_OF_4, min_size=2, max_size=2), key=ONE_OF_4)
    def equivocate(self, to, key) -> None:
        """An authorised author tells two replicas different things."""
        liar, hlc = self.world.admin, stamp(self.world.now)
        for replica, value in zip(to, (b"x", b"y"), strict=True):
            raw = self.world.entry(liar, KEYS[key], value, hlc=hlc).raw
            self.replicas[replica].ingest_untrusted(raw, self.world.now)

    @invariant()
    def whole(self) -> None:
        for replica in getattr(self, "replicas", []):
            replica.check_integrity()
            assert all(entry.signature_matches() for entry in replica.slots)

    def teardown(self) -> None:
        if not hasattr(self, "replicas"):
            return
        for _ in range(2):
            for one, other in itertools.combinations(range(4), 2):
                self._sync(one, other)
        assert len({view(r)[:2] for r in self.replicas}) == 1
        assert all(state(r) == state(self.replicas[0]) for r in self.replicas)
        for slot, hlc in self.acknowledged.items():
            assert all(r.slots.get(slot).hlc >= hlc for r in self.replicas)


@pytest.mark.slow
def test_four_replicas_under_attack_converge_without_loss(make_world) -> None:
    Mesh4.make_world = staticmethod(make_world)
    run_state_machine_as_test(
        Mesh4,
        settings=settings(max_examples=25, stateful_step_count=30, deadline=None),
    )
