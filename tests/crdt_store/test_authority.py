"""Who may write what, in every order of arrival."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.clock import stamp
from crdt_store.grants import CODEC, InviteTerms, Redemption, Revocation
from crdt_store.invites import make_invite, parse_token_untrusted, redeem
from crdt_store.outcome import Outcome
from crdt_store.roles import Role, may_write
from fabric.core.errors import ConfigError
from fabric.core.signing import Ed25519Signer


def _key(number: int) -> Ed25519Signer:
    return Ed25519Signer(number.to_bytes(32, "big"))


def invite(world, *, uses=1, ttl=86400, role=Role.WORKER, at=None):
    token, entry = make_invite(
        world.admin,
        world.mesh,
        ["/ip4/1.2.3.4/tcp/1"],
        role=role,
        uses=uses,
        ttl_seconds=ttl,
        now=world.now - 50 if at is None else at,
    )
    return parse_token_untrusted(token), entry


def test_root_owner_admin_worker(world) -> None:
    replica = world.replica()
    authority = replica.authority
    assert authority.role_of(world.owner.peer_id, world.now) is Role.OWNER
    assert authority.role_of(world.admin.peer_id, world.now) is Role.ADMIN
    assert authority.role_of(world.workers[0].peer_id, world.now) is Role.WORKER
    assert authority.role_of(world.stranger.peer_id, world.now) is None
    assert len(authority.members(world.now)) == 6


@pytest.mark.parametrize("role", [Role.OWNER, Role.ADMIN])
def test_authority_flows_strictly_downwards(world, role) -> None:
    replica = world.replica()
    own = world.grant(world.admin, world.workers[0], role)
    assert replica.ingest_untrusted(own.raw, world.now) is Outcome.UNAUTHORISED
    by_worker = world.grant(world.workers[0], world.stranger, Role.WORKER)
    assert replica.ingest_untrusted(by_worker.raw, world.now) is Outcome.UNAUTHORISED
    upwards = world.record(
        world.admin, f"0/rev/{world.owner.peer_id}", Revocation(cut=0)
    )
    assert replica.ingest_untrusted(upwards.raw, world.now) is Outcome.UNAUTHORISED


def test_a_grant_without_delegation_grants_nothing(world) -> None:
    replica = world.replica()
    plain = world.grant(world.owner, world.workers[1], Role.ADMIN, at=world.now - 80)
    assert replica.ingest_untrusted(plain.raw, world.now) is Outcome.ACCEPTED
    further = world.grant(world.workers[1], world.stranger, Role.WORKER)
    assert replica.ingest_untrusted(further.raw, world.now) is Outcome.UNAUTHORISED


def test_time_range_and_prefixes_of_a_grant_bound_its_entries(world) -> None:
    replica = world.replica()
    grant = world.grant(
        world.owner,
        world.stranger,
        Role.WORKER,
        prefixes=("j/",),
        not_before=int(world.now) - 60,
        not_after=int(world.now) - 30,
    )
    assert replica.ingest_untrusted(grant.raw, world.now) is Outcome.ACCEPTED
    assert replica.authority.membership(world.stranger.peer_id, world.now - 40).allowed
    late = replica.authority.membership(world.stranger.peer_id, world.now)
    assert late.code == "E_NOT_MEMBER"
    for at, key, outcome in (
        (-40, "j/a/spec", Outcome.ACCEPTED),
        (-40, "c/a/1", Outcome.UNAUTHORISED),
        (-70, "j/b/spec", Outcome.UNAUTHORISED),
        (-20, "j/c/spec", Outcome.UNAUTHORISED),
    ):
        entry = world.entry(world.stranger, key, at=world.now + at)
        assert replica.ingest_untrusted(entry.raw, world.now) is outcome


def test_an_entry_before_its_grant_is_neither_kept_nor_blacklisted(world) -> None:
    replica = world.replica()
    before = replica.index(authority=False).fingerprint()
    entry = world.entry(world.stranger, "j/a/spec")
    assert replica.ingest_untrusted(entry.raw, world.now) is Outcome.UNAUTHORISED
    assert replica.index(authority=False).fingerprint() == before
    assert replica.raw(entry.id) is None
    grant = world.grant(world.owner, world.stranger, Role.CLIENT)
    assert replica.ingest_untrusted(grant.raw, world.now) is Outcome.ACCEPTED
    assert replica.ingest_untrusted(entry.raw, world.now) is Outcome.ACCEPTED


def test_an_invite_admits_exactly_its_uses_and_the_rest_learn_why(world) -> None:
    token, terms = invite(world, uses=2)
    joiners = [world.stranger, *map(_key, range(200, 203))]
    entries = [
        redeem(token, joiner.peer_id, world.now - 40 + n)
        for n, joiner in enumerate(joiners)
    ]
    written = [world.entry(j, f"m/{j.peer_id}") for j in joiners]
    for seed in range(5):
        replica = world.replica()
        rest = [e.raw for e in (*entries, *written)]
        random.Random(seed).shuffle(rest)
        replica.ingest_batch_untrusted([terms.raw], world.now)
        for _ in range(3):  # re-offered, as reconciliation would
            for raw in rest:
                replica.ingest_untrusted(raw, world.now)
        allowed = [replica.authority.membership(j.peer_id, world.now) for j in joiners]
        assert [d.allowed for d in allowed] == [True, True, False, False]
        assert allowed[2].code == "E_INVITE_EXHAUSTED"
        assert allowed[2].next_step
        assert len(replica.slots.under("m/")) == 2
        assert len(replica.slots.under("inv/")) == 4
        replica.check_integrity()


def test_redemptions_after_expiry_or_by_another_key_are_refused(world) -> None:
    replica = world.replica()
    token, terms = invite(world, ttl=10, at=world.now - 50)
    me = world.stranger.peer_id
    unknown = redeem(token, me, world.now - 45)
    assert replica.ingest_untrusted(unknown.raw, world.now) is Outcome.NO_INVITE
    assert replica.ingest_untrusted(terms.raw, world.now) is Outcome.ACCEPTED
    late = redeem(token, me, world.now)
    assert replica.ingest_untrusted(late.raw, world.now) is Outcome.INVITE_EXPIRED
    decision = replica.authority.membership(me, world.now)
    assert decision.code == "E_INVITE_EXPIRED"
    forged = world.record(world.stranger, f"inv/{token.key}/{me}", Redemption(me))
    assert replica.ingest_untrusted(forged.raw, world.now) is Outcome.UNAUTHORISED
    other = world.entry(
        world.stranger, f"inv/{token.key}/{me}", CODEC.encode(Redemption(token.key))
    )
    assert replica.ingest_untrusted(other.raw, world.now) is Outcome.MALFORMED


def test_a_back_dated_redemption_is_refused_live_but_not_in_a_reconciliation(
    world,
) -> None:
    replica = world.replica()
    token, terms = invite(world, at=world.now - 9000)
    old = world.grant(world.owner, world.admin, Role.ADMIN, at=world.now - 80)
    replica.ingest_batch_untrusted([old.raw, terms.raw], world.now)
    assert replica.slots.get(terms.slot) is not None
    back_dated = redeem(token, world.stranger.peer_id, world.now - 8000)
    fresh_after = world.now - 3600
    live = replica.ingest_untrusted(back_dated.raw, world.now, fresh_after=fresh_after)
    assert live is Outcome.STALE_REDEMPTION
    assert replica.ingest_untrusted(back_dated.raw, world.now) is Outcome.ACCEPTED


def test_nobody_is_invited_to_be_admin(world) -> None:
    with pytest.raises(ConfigError, match="cannot carry"):
        invite(world, role=Role.ADMIN)
    replica = world.replica()
    key = f"0/inv/{world.stranger.peer_id}"
    terms = InviteTerms(Role.ADMIN, 1, int(world.now) + 100)
    entry = world.record(world.owner, key, terms)
    assert replica.ingest_untrusted(entry.raw, world.now) is Outcome.MALFORMED
    by_worker = world.record(
        world.workers[0], key, InviteTerms(Role.WORKER, 1, int(world.now) + 100)
    )
    assert replica.ingest_untrusted(by_worker.raw, world.now) is Outcome.UNAUTHORISED


def test_a_revoked_author_cannot_write_not_even_back_dated(world) -> None:
    replica = world.replica()
    worker = world.workers[0]
    kept = world.entry(worker, "j/kept/spec", at=world.now - 30)
    replica.ingest_untrusted(kept.raw, world.now)
    known = [e.id[:16] for e in replica.slots.authored(worker.public_key)]
    record = Revocation(stamp(world.now - 20), "stolen key", tuple(known))
    revocation = world.record(world.admin, f"0/rev/{worker.peer_id}", record)
    assert replica.ingest_untrusted(revocation.raw, world.now) is Outcome.ACCEPTED
    after = world.entry(worker, "j/after/spec")
    back_dated = world.entry(worker, "j/before/spec", at=world.now - 40)
    for entry in (after, back_dated):
        assert replica.ingest_untrusted(entry.raw, world.now) is Outcome.REVOKED
    assert replica.slots.get(kept.slot) == kept
    decision = replica.authority.membership(worker.peer_id, world.now)
    assert decision.code == "E_REVOKED"
    assert "stolen key" in decision.reason


def test_revoking_an_admin_voids_what_it_signed_later_and_all_that_hangs_on_it(
    world,
) -> None:
    token, terms = invite(world, at=world.now - 10)
    joined = redeem(token, world.stranger.peer_id, world.now - 9)
    written = world.entry(world.stranger, f"m/{world.stranger.peer_id}")
    record = Revocation(stamp(world.now - 20), "gone")
    revocation = world.record(world.owner, f"0/rev/{world.admin.peer_id}", record)
    late, early = world.replica(), world.replica()
    chain = [terms.raw, joined.raw, written.raw]
    late.ingest_batch_untrusted(chain, world.now)
    assert late.authority.membership(world.stranger.peer_id, world.now).allowed
    late.ingest_untrusted(revocation.raw, world.now)
    early.ingest_untrusted(revocation.raw, world.now)
    early.ingest_batch_untrusted(chain, world.now)
    for replica in (late, early):
        assert not replica.authority.membership(
            world.stranger.peer_id, world.now
        ).allowed
        assert replica.slots.get(written.slot) is None
        assert replica.slots.get(terms.slot) is None
        # what the admin signed before the cut stands
        assert len(replica.slots.under("0/grant/")) == 6
        replica.check_integrity()
    for tree in (True, False):
        assert (
            late.index(authority=tree).fingerprint()
            == early.index(authority=tree).fingerprint()
        )


def test_a_lifted_revocation_lets_the_peer_write_again(world) -> None:
    replica = world.replica()
    worker = world.workers[0]
    for at, lifted in ((-20, False), (-10, True)):
        record = Revocation(0, "", lifted=lifted)
        key = f"0/rev/{worker.peer_id}"
        entry = world.record(world.owner, key, record, at=world.now + at)
        assert replica.ingest_untrusted(entry.raw, world.now) is Outcome.ACCEPTED
        allowed = replica.authority.membership(worker.peer_id, world.now).allowed
        assert allowed is lifted


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_authority_does_not_depend_on_the_order_of_arrival(make_world, seed) -> None:
    world = make_world()
    rng = random.Random(seed)
    token, _ = invite(world, at=world.now - 60)
    terms = world.record(
        world.admin,
        f"0/inv/{token.key}",
        InviteTerms(Role.WORKER, 1, int(world.now) + 100),
        at=world.now - 60,
    )
    entries = [
        *(e for e in world.authority()),
        terms.raw,
        redeem(token, world.stranger.peer_id, world.now - 40).raw,
        redeem(token, _key(77).peer_id, world.now - 30).raw,
        world.record(
            world.admin,
            f"0/rev/{world.workers[0].peer_id}",
            Revocation(stamp(world.now - 30)),
            at=world.now - 20,
        ).raw,
        world.grant(world.owner, world.workers[1], Role.ADMIN, at=world.now - 15).raw,
        *(
            world.entry(j, f"m/{j.peer_id}", at=world.now - rng.choice([10, 40])).raw
            for j in (world.stranger, _key(77), *world.workers[:2])
        ),
    ]
    results = set()
    for _ in range(2):
        replica = world.replica()
        rng.shuffle(entries)
        for _ in range(5):
            for raw in entries:
                replica.ingest_untrusted(raw, world.now)
        replica.check_integrity()
        members = replica.authority.members(world.now)
        results.add((replica.index(authority=False).fingerprint(), members))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("role", "key", "allowed"),
    [
        (Role.WORKER, "m/me", True),
        (Role.WORKER, "m/you", False),
        (Role.WORKER, "p/llama/me", True),
        (Role.WORKER, "p/llama/you", False),
        (Role.WORKER, "j/a/spec", True),
        (Role.WORKER, "j/a/other", False),
        (Role.WORKER, "j//spec", False),
        (Role.WORKER, "0/grant/me", False),
        (Role.WORKER, "inv/k/me", False),
        (Role.CLIENT, "a/j/main", False),
        (Role.CLIENT, "j/a/spec", True),
        (Role.RELAY, "m/me", True),
        (Role.RELAY, "j/a/spec", False),
        (Role.VERIFIER, "t/you/me", True),
        (Role.OWNER, "m/you", False),
    ],
)
def test_the_table_of_roles(role, key, allowed) -> None:
    assert may_write(role, "me", key) is allowed
