"""What a partition let in and what the merge then decides: admissions, revocations."""

from __future__ import annotations

import itertools

import pytest

from crdt_store.grants import KEPT_ID_BYTES, Redemption, Revocation
from crdt_store.invites import make_invite, parse_token_untrusted, redeem
from crdt_store.outcome import Outcome
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from crdt_store.replica import Replica
from tests.crdt_store.conftest import key_of

salts = itertools.count(1)


def merge(replicas: list[Replica], now: float) -> None:
    """Reconcile every pair, twice, as members that trust each other's past."""
    for _ in range(2):
        for one, other in itertools.combinations(replicas, 2):
            session = Session(one, next(salts).to_bytes(8, "big"))
            while (data := session.next_request()) is not None:
                request = parse_request_untrusted(data)
                other.ingest_batch_untrusted(getattr(request, "entries", ()), now)
                response = answer(other, request)
                one.ingest_batch_untrusted(session.receive_untrusted(response), now)
    assert len({replica.state_hash() for replica in replicas}) == 1
    for replica in replicas:
        replica.check_integrity()


def admit(replica, world, token, joiner, at) -> Redemption:
    """Let ``joiner`` in at ``replica``, and have it write something there."""
    redemption = redeem(token, joiner.peer_id, at)
    taken = replica.ingest_untrusted(redemption.raw, at, fresh_after=at - 3600)
    assert taken is Outcome.ACCEPTED
    for key in (f"m/{joiner.peer_id}", "j/made-by-it/spec"):
        entry = world.entry(joiner, key, at=at)
        assert replica.ingest_untrusted(entry.raw, at) is Outcome.ACCEPTED
    assert replica.authority.membership(joiner.peer_id, at).allowed
    return redemption


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_over_admission_lasts_only_as_long_as_the_partition(world, uses) -> None:
    token, terms = make_invite(
        world.admin, world.mesh, [], uses=uses, now=world.now - 50
    )
    invite = parse_token_untrusted(token)
    left, right = [[world.replica() for _ in range(2)] for _ in range(2)]
    for replica in (*left, *right):
        replica.ingest_untrusted(terms.raw, world.now)
    joiners = [key_of(200 + n) for n in range(2 * uses)]
    drawn = []
    for n, joiner in enumerate(joiners):  # in turns: both sides fill up to `uses`
        side = (left, right)[n % 2]
        drawn.append(admit(side[0], world, invite, joiner, world.now + n))
    for side in (left, right):
        merge(side, world.now + 60)
        allowed = [
            side[1].authority.membership(j.peer_id, world.now + 60).allowed
            for j in joiners
        ]
        assert sum(allowed) == uses
    everybody = [*left, *right]
    later = world.now + 5 * 3600  # a long partition: the redemptions are old
    merge(everybody, later)
    order = sorted(range(len(drawn)), key=lambda n: drawn[n].order)
    for place, n in enumerate(order):
        peer = joiners[n].peer_id
        for replica in everybody:
            decision = replica.authority.membership(peer, later)
            assert decision.allowed == (place < uses)
            written = replica.slots.authored(joiners[n].public_key)
            assert bool(written) == (place < uses)
            if place >= uses:
                assert decision.code == "E_INVITE_EXHAUSTED"
                assert "no uses left" in decision.reason
                assert decision.next_step
    last = joiners[order[-1]]
    again = world.entry(last, "j/again/spec", at=later)
    assert everybody[0].ingest_untrusted(again.raw, later) is Outcome.UNAUTHORISED


def test_an_earlier_redemption_from_the_other_side_displaces_a_member(world) -> None:
    """The first by (hlc, id) stand, whoever heard of them first."""
    token, terms = make_invite(world.admin, world.mesh, [], uses=1, now=world.now - 50)
    invite = parse_token_untrusted(token)
    here, there = world.replica(), world.replica()
    for replica in (here, there):
        replica.ingest_untrusted(terms.raw, world.now)
    late, early = key_of(301), key_of(300)
    admit(here, world, invite, late, world.now + 20)
    admit(there, world, invite, early, world.now + 10)
    merge([here, there], world.now + 30)
    for replica in (here, there):
        members = replica.authority.members(world.now + 30)
        assert early.peer_id in members
        assert late.peer_id not in members
        assert not replica.slots.authored(late.public_key)


def test_a_revoked_peer_cannot_return_through_a_partitioned_island(world) -> None:
    culprit, now = world.workers[3], world.now
    mainland = [world.replica(signer) for signer in world.workers[:2]]
    island = [world.replica(world.workers[2]), world.replica(culprit)]
    known = world.entry(culprit, "j/known/spec", at=now - 20)
    for replica in (*mainland, *island):
        replica.ingest_untrusted(known.raw, now)
    cut = Revocation(known.hlc, "stolen", (known.id[:KEPT_ID_BYTES],))
    revocation = world.record(world.admin, f"0/rev/{culprit.peer_id}", cut, at=now + 1)
    assert mainland[0].ingest_untrusted(revocation.raw, now + 1) is Outcome.ACCEPTED
    # the island does not know: there the culprit writes, back-dates and rewrites
    written = [
        world.entry(culprit, "j/later/spec", at=now + 5),
        world.entry(culprit, "j/back-dated/spec", at=now - 30),
        world.entry(culprit, "j/known/spec", b"rewritten", at=now + 6),
    ]
    for replica in island:
        for entry in written:
            assert replica.ingest_untrusted(entry.raw, now + 9) is Outcome.ACCEPTED
    later = now + 7200
    merge([*mainland, *island], later)
    for replica in (*mainland, *island):
        decision = replica.authority.membership(culprit.peer_id, later)
        assert decision.code == "E_REVOKED"
        assert "stolen" in decision.reason
        assert replica.slots.authored(culprit.public_key) == [known]
        # nor by showing its old grant, or a new entry, anywhere
        old_grant = next(
            e for e in replica.slots.under("0/grant/") if culprit.peer_id in e.key
        )
        replica.ingest_untrusted(old_grant.raw, later)
        fresh = world.entry(culprit, f"m/{culprit.peer_id}", at=later)
        assert replica.ingest_untrusted(fresh.raw, later) is Outcome.REVOKED
        assert not replica.authority.membership(culprit.peer_id, later).allowed


def test_a_revoked_peer_is_not_let_in_again_by_an_invite_of_the_island(world) -> None:
    culprit, now = world.workers[3], world.now
    token, terms = make_invite(world.admin, world.mesh, [], uses=5, now=now - 50)
    here, there = world.replica(), world.replica()
    for replica in (here, there):
        replica.ingest_untrusted(terms.raw, now)
    revocation = world.record(
        world.admin, f"0/rev/{culprit.peer_id}", Revocation(0, "out"), at=now + 1
    )
    here.ingest_untrusted(revocation.raw, now + 1)
    admit(there, world, parse_token_untrusted(token), culprit, now + 5)
    merge([here, there], now + 60)
    for replica in (here, there):
        decision = replica.authority.membership(culprit.peer_id, now + 60)
        assert decision.code == "E_REVOKED"
        assert not replica.slots.authored(culprit.public_key)
