"""Stores of several peers: what spreads, what heals, what each table holds."""

from __future__ import annotations

import pytest
import trio

from attestation.ports import Verdict
from attestation.states import State, Tier
from crdt_store.entry import Entry
from crdt_store.invites import parse_token_untrusted, redeem
from crdt_store.job_views import JobStatus
from crdt_store.memory_storage import MemoryStorage
from crdt_store.roles import Role
from crdt_store.views import CheckpointHead
from fabric.core.digest import hex_digest
from fabric.core.errors import (
    RemoteProtocolError,
    RemoteRefused,
)
from fabric.core.ids import JobId, PeerId
from tests.crdt_store.conftest import key_of
from tests.crdt_store.peers import Peers, record, until


async def test_three_stores_agree_by_push_alone_within_a_second(
    peers, world, network, autojump_clock
):
    stores = [await peers.open(signer) for signer in world.workers[:3]]
    await trio.sleep(2)  # first reconciliations are over
    calls = network.calls.copy()
    watch = stores[1].members.watch()
    await stores[0].members.put(record("zero"))
    with trio.fail_after(1):
        await watch.changed()
    await until(lambda: len(stores[2].members.all()) == 1)
    assert stores[1].members.get(world.workers[0].peer_id) == record("zero")
    assert network.calls == calls
    assert len({store.state_hash() for store in stores}) == 1


async def test_what_a_newcomer_found_about_who_admits_it_is_written_once_it_may(
    peers, world, autojump_clock
):
    store = await peers.open(world.workers[0], known=False)
    about = world.owner.peer_id
    verdict = Verdict(about, State.TRUSTED, Tier.SOFTWARE, "fine")
    store.verdicts.record(verdict)
    await trio.sleep(1)
    store.ingest_authority_untrusted(world.authority())
    me = world.workers[0].peer_id
    await until(lambda: store.verdicts.for_subject(about) == {me: verdict})


async def test_a_partition_heals_by_reconciliation(
    peers, world, network, autojump_clock
):
    stores = [await peers.open(signer) for signer in world.workers[:3]]
    await trio.sleep(2)
    network.partition({world.workers[0].peer_id})
    for number, store in enumerate(stores):
        await store.members.put(record(f"n{number}"))
    await trio.sleep(10)
    assert len(stores[0].members.all()) == 1
    assert len(stores[1].members.all()) == 2
    network.heal()
    with trio.fail_after(15):
        await until(lambda: len({s.state_hash() for s in stores}) == 1)
    for store in stores:
        assert {r.name for r in store.members.all().values()} == {"n0", "n1", "n2"}


async def test_lost_pushes_are_repaired(peers, world, network, autojump_clock):
    stores = [await peers.open(signer) for signer in world.workers[:2]]
    network.lose_pushes = True
    for step in range(300):
        await stores[0].heads.put(
            "run",
            step,
            CheckpointHead(root="ab", bytes=1, round=step, writer=""),
        )
    with trio.fail_after(20):
        await until(lambda: len(stores[1].heads.all("run")) == 300)
    assert stores[1].heads.latest("run")[0] == 299


async def test_idle_sync_costs_at_most_64_bytes_per_side(peers, world, autojump_clock):
    stores = [await peers.open(signer) for signer in world.workers[:2]]
    await stores[0].members.put(record("zero"))
    await stores[1].sync_with(world.workers[0].peer_id)
    report = await stores[1].sync_with(world.workers[0].peer_id)
    assert report.requests == 1
    assert report.sent_bytes <= 64
    assert report.received_bytes <= 64
    print(report)


async def test_an_idle_mesh_is_quiet(peers, world, network, autojump_clock):
    for signer in world.workers[:3]:
        await peers.open(signer)
    await trio.sleep(10)
    network.calls.clear()
    await trio.sleep(300)
    assert 0 < network.calls["store.sync"] <= 3 * 300 / 5


async def test_a_joiner_becomes_a_member_everywhere(peers, world, autojump_clock):
    owner = await peers.open(world.owner)
    worker = await peers.open(world.workers[0])
    token = await owner.admin.invite(["/ip4/127.0.0.1/tcp/1/p2p/x"], role=Role.WORKER)
    invite = parse_token_untrusted(token)
    assert invite.mesh == world.mesh
    joiner = await peers.open(world.stranger, known=False)
    me = world.stranger.peer_id
    assert worker.authority.membership(me).code == "E_NOT_MEMBER"
    with pytest.raises(RemoteRefused) as refused:
        await joiner.members.put(record("new"))
    assert refused.value.code == "E_NOT_MEMBER"
    assert refused.value.next_step
    credential = redeem(invite, me, peers.clock())
    assert owner.ingest_untrusted(credential.raw, me)
    joiner.ingest_authority_untrusted(owner.authority_entries())
    assert joiner.authority.role_of(me) is Role.WORKER
    assert joiner.credential() == [credential.raw]
    await joiner.members.put(record("new"))
    await until(lambda: worker.members.get(me) == record("new"))
    assert worker.authority.membership(me).allowed
    await owner.admin.revoke(me, "gone")
    await until(lambda: worker.authority.membership(me).code == "E_REVOKED")
    assert worker.verdicts.revocation(me)
    await owner.admin.lift_revocation(me)
    await until(lambda: worker.authority.membership(me).allowed)


async def test_a_redemption_from_before_our_last_sync_is_refused_if_shown_live(
    peers, world, autojump_clock
):
    """With an invite found later nobody can pretend to have joined in time."""
    owner = await peers.open(world.owner)
    other = await peers.open(world.workers[0])
    token = await owner.admin.invite([], role=Role.WORKER, uses=9)
    invite = parse_token_untrusted(token)
    world.now += 3 * 3600
    await owner.sync_with(world.workers[0].peer_id)

    def redeemed(number: int, hours_ago: float) -> Entry:
        joiner = key_of(400 + number).peer_id
        return redeem(invite, joiner, peers.clock() - hours_ago * 3600)

    old, young = redeemed(0, 1.1), redeemed(1, 0.9)
    assert not owner.ingest_untrusted(old.raw, world.stranger.peer_id)
    assert owner.ingest_untrusted(young.raw, world.stranger.peer_id)
    counts = peers.counters[world.owner.peer_id].snapshot()
    assert counts["store_refused_total:stale_redemption"] == 1
    # a member brings it from its side of a partition: there it was in time
    other.ingest_authority_untrusted([old.raw])
    await other.sync_with(world.owner.peer_id)
    await until(lambda: owner.authority.membership(joiner_of(old)).allowed)


def joiner_of(redemption: Entry) -> PeerId:
    return PeerId(redemption.key.rsplit("/", 1)[1])


async def test_a_restart_does_not_forget_when_it_was_in_sync(
    world, network, autojump_clock
):
    disk = MemoryStorage()
    for known in (True, False):
        async with trio.open_nursery() as nursery:
            peers = Peers(world, network, nursery)
            owner = await peers.open(world.owner, storage=disk, known=known)
            if known:
                token = await owner.admin.invite([], role=Role.WORKER, uses=9)
                await owner.members.put(record("owner"))
            else:
                invite = parse_token_untrusted(token)
                stale = redeem(invite, world.stranger.peer_id, peers.clock() - 4000)
                assert not owner.ingest_untrusted(stale.raw, world.stranger.peer_id)
                fresh = redeem(invite, world.stranger.peer_id, peers.clock() - 60)
                assert owner.ingest_untrusted(fresh.raw, world.stranger.peer_id)
            nursery.cancel_scope.cancel()


async def test_typed_tables(peers, world, autojump_clock):
    store = await peers.open(world.workers[0])
    other = await peers.open(world.workers[1])
    spec = b"spec"
    job = JobId(hex_digest(spec))
    me = world.workers[0].peer_id
    await store.jobs.put_spec(job, spec)
    with pytest.raises(ValueError, match="BLAKE3"):
        await store.jobs.put_spec(JobId("00"), spec)
    assert store.jobs.spec(job) == spec
    assert store.jobs.author(job) == me
    await store.jobs.put_status(job, JobStatus(state="done", counter=3))
    await store.jobs.put_status(job, JobStatus(state="running", counter=9))
    assert store.jobs.status(job) == JobStatus(state="done", counter=3)
    await other.jobs.put_status(job, JobStatus(state="running", counter=10))
    await until(lambda: other.jobs.spec(job) == spec)
    await until(lambda: other.jobs.status(job) == JobStatus(state="done", counter=3))
    assert list(other.jobs.all()) == [job]

    await store.assignments.put(job, 4, b"four")
    await other.assignments.put(job, 5, b"five")
    await until(lambda: store.assignments.get(job).generation == b"five")
    assert len(store.assignments.candidates(job)) == 2

    await store.members.put(record("host"))
    await store.placements.put("model", b"layers 0-3")
    await until(lambda: other.placements.get("model") == {me: b"layers 0-3"})
    await store.placements.put("model", b"")
    await until(lambda: other.placements.get("model") == {})

    verdict = Verdict(world.workers[1].peer_id, State.TRUSTED, Tier.SOFTWARE, "fine")
    store.verdicts.record(verdict)
    about = world.workers[1].peer_id
    await until(lambda: other.verdicts.for_subject(about) == {me: verdict})


async def test_a_routine_pass_is_not_written_again(
    peers, world, network, autojump_clock
):
    store = await peers.open(world.workers[0])
    about = world.workers[1].peer_id
    station = network.stations[world.workers[0].peer_id]

    async def sent_after(state: State, evidence: bytes) -> int:
        before = len(station.published)
        verdict = Verdict(about, state, Tier.SOFTWARE, "fine", evidence)
        store.verdicts.record(verdict)
        await trio.sleep(2)
        return len(station.published) - before

    assert await sent_after(State.TRUSTED, b"1" * 32) == 1
    assert await sent_after(State.TRUSTED, b"2" * 32) == 0
    assert await sent_after(State.QUARANTINED, b"3" * 32) == 1
    assert await sent_after(State.QUARANTINED, b"4" * 32) == 1  # evidence of a failure


async def test_entries_expire_by_the_receivers_clock(peers, world, autojump_clock):
    stores = [await peers.open(signer) for signer in world.workers[:2]]
    await stores[0].members.put(record("host"))
    await stores[0].put(f"p/model/{world.workers[0].peer_id}", b"here", 120)
    await until(lambda: stores[1].placements.get("model"))
    await trio.sleep(125)
    assert stores[0].placements.get("model") == stores[1].placements.get("model") == {}
    await trio.sleep(20)
    assert stores[1].placements.get("model") == {}


async def test_garbage_from_peers_is_counted(peers, world, network, autojump_clock):
    store = await peers.open(world.workers[0])
    before = store.state_hash()
    station = network.stations[world.workers[0].peer_id]
    other = network.station(world.workers[1].peer_id)
    await other.publish(f"fabric/store/{world.mesh.id}", b"\xff" * 100)
    assert not store.ingest_untrusted(b"garbage", world.workers[1].peer_id)
    forged = world.entry(world.stranger, "j/x/spec")
    assert not store.ingest_untrusted(forged.raw, world.workers[1].peer_id)
    with pytest.raises(RemoteProtocolError):
        await station.handlers["store.sync"](world.workers[1].peer_id, b"\x00garbage")
    await trio.sleep(1)
    counts = peers.counters[world.workers[0].peer_id].snapshot()
    assert counts["protocol_errors_total:store_push"] == 1
    assert counts["store_refused_total:malformed"] == 1
    assert counts["store_refused_total:unauthorised"] == 1
    assert store.state_hash() == before
