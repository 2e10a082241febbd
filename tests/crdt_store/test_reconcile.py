"""Reconciliation: sync equals union, bounded bytes, hostile partners."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.invites import make_invite, parse_token_untrusted, redeem
from crdt_store.messages import RESPONSE, Answer, Digest, Listing, Trees
from crdt_store.ranges import END
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from crdt_store.replica import Replica
from fabric.core.errors import LocalProtocolError, RemoteProtocolError
from fabric.core.signing import Ed25519Signer

SALT = bytes(8)


def reconcile(one: Replica, other: Replica, now: float, *, stop_after=None):
    """Run a session of ``one`` with ``other``; return (requests, bytes)."""
    session, moved = Session(one, SALT), 0
    while (data := session.next_request()) is not None:
        request = parse_request_untrusted(data)
        other.ingest_batch_untrusted(getattr(request, "entries", ()), now)
        response = answer(other, request)
        moved += len(data) + len(response)
        if stop_after is not None and session.num_requests > stop_after:
            break  # the response is lost
        one.ingest_batch_untrusted(session.receive_untrusted(response), now)
    return session.num_requests, moved


def same(*replicas: Replica) -> bool:
    return len({replica.state_hash() for replica in replicas}) == 1


def filled(world, numbers, size=32) -> Replica:
    replica = world.replica()
    for n in numbers:
        worker = world.workers[n % 4]
        entry = world.entry(worker, f"j/{n}/spec", bytes(size), at=world.now - n % 7)
        # signatures are not what is tested here
        replica.apply(entry, world.now)
    return replica


@settings(max_examples=20, deadline=None)
@given(mine=st.sets(st.integers(0, 60)), theirs=st.sets(st.integers(0, 60)))
def test_sync_is_the_union(make_world, mine, theirs) -> None:
    world = make_world()
    one, other = filled(world, mine), filled(world, theirs)
    reconcile(one, other, world.now)
    assert same(one, other, filled(world, mine | theirs))
    one.check_integrity()
    other.check_integrity()


def test_a_newcomer_gets_authority_first_and_then_everything(world) -> None:
    full = filled(world, range(40))
    token, terms = make_invite(world.admin, world.mesh, [], uses=30, now=world.now - 50)
    invite = parse_token_untrusted(token)
    full.ingest_untrusted(terms.raw, world.now)
    for n in range(30):
        signer = Ed25519Signer(random.Random(n).randbytes(32))
        redeemed = redeem(invite, signer.peer_id, world.now - 40 + n)
        full.ingest_untrusted(redeemed.raw, world.now)
        written = world.entry(signer, f"m/{signer.peer_id}")
        full.ingest_untrusted(written.raw, world.now)
    assert len(full.slots.under("m/")) == 30
    empty = Replica(world.mesh, world.stranger.public_key)
    requests, _ = reconcile(empty, full, world.now)
    assert same(empty, full)
    assert requests <= 12


def test_idle_sync_is_one_exchange_of_54_bytes(world) -> None:
    one, other = filled(world, range(500)), filled(world, range(500))
    assert reconcile(one, other, world.now) == (1, 54)


@pytest.mark.slow
def test_one_difference_in_5000_costs_little(world) -> None:
    one, other = filled(world, range(5000)), filled(world, range(5000))
    extra = world.entry(world.workers[0], "j/new/spec")
    other.apply(extra, world.now)
    requests, moved = reconcile(one, other, world.now)
    assert same(one, other)
    print(f"5000 entries, 1 difference: {requests} requests, {moved} B")
    assert requests <= 7
    assert moved <= 3000


@pytest.mark.slow
def test_healing_costs_at_most_six_times_the_entries(world) -> None:
    one = filled(world, range(1100))
    other = filled(world, [*range(1000), *range(1100, 1200)])
    missing = [e for e in one.slots if other.slots.get(e.slot) is None]
    optimum = 2 * sum(len(entry.raw) for entry in missing)
    requests, moved = reconcile(one, other, world.now)
    assert same(one, other)
    print(f"200 of 1200 differ: {requests} requests, {moved / optimum:.2f} x optimum")
    assert moved <= 6 * optimum


def test_what_does_not_fit_one_message_comes_in_several(world) -> None:
    full = filled(world, range(150), size=4096)
    empty = world.replica()
    requests, _ = reconcile(empty, full, world.now)
    assert same(empty, full)
    assert requests > 3
    back = world.replica()
    reconcile(full, back, world.now)
    assert same(back, full)


@settings(max_examples=7, deadline=None)
@given(stop=st.integers(0, 6))
def test_a_cut_session_leaves_both_sides_whole(make_world, stop) -> None:
    world = make_world()
    one, other = filled(world, range(120)), filled(world, range(60, 260))
    reconcile(one, other, world.now, stop_after=stop)
    one.check_integrity()
    other.check_integrity()
    reconcile(one, other, world.now)
    assert same(one, other, filled(world, range(260)))


def test_unauthorised_entries_of_a_partner_do_not_enter_or_loop(world) -> None:
    one, other = filled(world, range(5)), filled(world, range(5))
    rogue = world.entry(world.stranger, "j/rogue/spec")
    other.apply(rogue, world.now)
    requests, _ = reconcile(one, other, world.now)
    assert requests <= 4
    assert one.slots.get(rogue.slot) is None


ANSWERS = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda parts: RESPONSE.encode(Answer((tuple(parts),), (b"junk",))),
        st.lists(
            st.one_of(
                st.builds(Digest, st.integers(0, END - 1), st.just(b"x" * 8)),
                st.builds(Listing, st.integers(0, END - 1), st.binary(max_size=24)),
            ),
            max_size=4,
        ),
    ),
    st.just(RESPONSE.encode(Trees(b"a" * 8, b"b" * 8))),
)


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(ANSWERS, min_size=1, max_size=12))
def test_a_hostile_responder_ends_the_session_at_worst(make_world, answers) -> None:
    world = make_world()
    replica = filled(world, range(3))
    before = replica.index(authority=False).fingerprint()
    session = Session(replica, SALT)
    for data in answers:
        if session.next_request() is None:
            break
        try:
            replica.ingest_batch_untrusted(session.receive_untrusted(data), world.now)
        except RemoteProtocolError:
            assert session.done
            assert session.next_request() is None
            break
    assert replica.index(authority=False).fingerprint() == before
    replica.check_integrity()


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_a_hostile_initiator_gets_a_refusal_or_an_answer(make_world, data) -> None:
    replica = filled(make_world(), range(3))
    try:
        request = parse_request_untrusted(data)
    except RemoteProtocolError:
        return
    RESPONSE.decode_untrusted(answer(replica, request))


def test_asking_twice_without_an_answer_is_our_bug(world) -> None:
    session = Session(world.replica(), SALT)
    session.next_request()
    with pytest.raises(LocalProtocolError):
        session.next_request()


def test_a_newer_entry_is_fetched_before_an_older_one_is_offered(world) -> None:
    one, other = filled(world, range(50)), filled(world, range(50))
    for n in range(20):
        worker = world.workers[n % 4]
        newer = world.entry(worker, f"j/{n}/spec", b"new", at=world.now + 1)
        other.apply(newer, world.now)
    session, carried = Session(one, SALT), 0
    while (data := session.next_request()) is not None:
        request = parse_request_untrusted(data)
        carried += len(getattr(request, "entries", ()))
        entries = session.receive_untrusted(answer(other, request))
        one.ingest_batch_untrusted(entries, world.now)
    assert same(one, other)
    assert carried == 0


def test_what_fades_here_is_not_asked_for_again(world) -> None:
    """A partner whose clock is behind still offers what is about to expire."""
    one, other = world.replica(), world.replica()
    fading = world.entry(world.workers[0], "j/1/st", ttl=1000)
    lasting = world.entry(world.workers[0], "j/2/st")
    for replica in (one, other):
        replica.apply(fading, world.now)
    other.apply(lasting, world.now)
    one.tick(world.now + 950)
    session, came = Session(one, SALT), []
    while (data := session.next_request()) is not None:
        response = answer(other, parse_request_untrusted(data))
        came += session.receive_untrusted(response)
        one.ingest_batch_untrusted(came, world.now + 950)
    assert came == [lasting.raw]
