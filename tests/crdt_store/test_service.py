"""The whole store over memory fakes, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from attestation.ports import Verdict
from attestation.states import State, Tier
from crdt_store.config import StoreConfig
from crdt_store.invites import parse_token_untrusted, redeem
from crdt_store.job_views import JobStatus
from crdt_store.memory_storage import MemoryStorage
from crdt_store.roles import Role
from crdt_store.service import open_store
from crdt_store.views import CheckpointHead, Hardware, MemberRecord
from fabric.core.digest import hex_digest
from fabric.core.errors import (
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import JobId
from fabric.core.telemetry import Counters

NOWHERE = Path("/nonexistent")


class Peers:
    """Stores of one world on one network, on trio's (virtual) clock."""

    def __init__(self, world, network, nursery) -> None:
        self.world, self.network, self.nursery = world, network, nursery
        self.counters: dict[str, Counters] = {}
        self.start = trio.current_time()

    def clock(self) -> float:
        return self.world.now + trio.current_time() - self.start

    async def open(self, signer, *, storage=None, known=True):
        store = await self.nursery.start(self._keep_open, signer, storage)
        if known:
            store.ingest_authority_untrusted(self.world.authority())
        return store

    async def _keep_open(self, signer, storage, *, task_status) -> None:
        counters = self.counters[signer.peer_id] = Counters()
        station = self.network.station(signer.peer_id)
        async with open_store(
            StoreConfig(),
            NOWHERE,
            signer,
            self.world.mesh,
            station,
            station,
            self.clock,
            counters,
            storage=storage or MemoryStorage(),
        ) as store:
            task_status.started(store)
            await trio.sleep_forever()


@pytest.fixture
async def peers(world, network, nursery):
    return Peers(world, network, nursery)


async def until(condition) -> None:
    with trio.fail_after(120):
        while not condition():  # noqa: ASYNC110 (any condition)
            await trio.sleep(0.05)


def record(name: str) -> MemberRecord:
    return MemberRecord(
        name=name, addrs=("/ip4/127.0.0.1/tcp/1",), hardware=Hardware(2)
    )


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


async def test_a_full_disk_refuses_the_write_and_loses_nothing(
    peers, world, autojump_clock
):
    class Full(MemoryStorage):
        full = False

        def write(self, upserts, deletes, evidence=()) -> None:
            if self.full:
                raise ResourceExhausted("no space", code="E_DISK_FULL")
            super().write(upserts, deletes, evidence)

    disk = Full()
    store = await peers.open(world.workers[0], storage=disk)
    other = await peers.open(world.workers[1])
    await store.members.put(record("before"))
    disk.full = True
    with pytest.raises(ResourceExhausted):
        await store.members.put(record("refused"))
    assert store.members.all()[world.workers[0].peer_id].name == "before"
    await other.members.put(record("other"))  # goes on in memory
    await until(lambda: world.workers[1].peer_id in store.members.all())
    disk.full = False
    await store.members.put(record("later"))
    await until(lambda: any(b"other" in raw for raw in disk.load()))
    assert sum(b"later" in raw for raw in disk.load()) == 1


async def test_a_restart_keeps_state_and_its_clock(world, network, autojump_clock):
    disk = MemoryStorage()
    key = f"m/{world.workers[0].peer_id}"
    stamps = []
    for jump in (0, 3, -20, 1):  # the wall clock jumps back 20 s across a restart
        world.now += jump
        async with trio.open_nursery() as nursery:
            peers = Peers(world, network, nursery)
            store = await peers.open(world.workers[0], storage=disk, known=not stamps)
            assert store.authority.role_of(world.workers[0].peer_id) is Role.WORKER
            entries = [await store.put(key, b"", 0) for _ in range(2)]
            stamps += [entry.hlc for entry in entries]
            nursery.cancel_scope.cancel()
    assert stamps == sorted(set(stamps))


async def test_a_clock_set_back_by_an_hour_is_an_error_not_a_lost_write(
    peers, world, autojump_clock
):
    store = await peers.open(world.workers[0])
    await store.members.put(record("now"))
    world.now -= 3600
    with pytest.raises(ConfigError, match="clock") as refused:
        await store.members.put(record("past"))
    assert refused.value.code == "E_CLOCK"


async def test_entries_expire_by_the_receivers_clock(peers, world, autojump_clock):
    stores = [await peers.open(signer) for signer in world.workers[:2]]
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


async def test_promises_outlive_the_store(world, network, autojump_clock):
    disk = MemoryStorage()
    async with trio.open_nursery() as nursery:
        store = await Peers(world, network, nursery).open(world.owner, storage=disk)
        await store.save_promise("job", 3, b"three")
        with pytest.raises(LocalProtocolError, match="promised 3"):
            await store.save_promise("job", 2, b"two")
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        store = await Peers(world, network, nursery).open(world.owner, storage=disk)
        assert store.load_promises()["job"].blob == b"three"
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_folder_on_disk_is_restored_and_has_one_user(world, network, tmp_path):
    station = network.station(world.owner.peer_id)
    arguments = (
        StoreConfig(),
        tmp_path / "store",
        world.owner,
        world.mesh,
        station,
        station,
        lambda: world.now,
        Counters(),
    )
    async with open_store(*arguments) as store:
        store.ingest_authority_untrusted(world.authority())
        await store.members.put(record("owner"))
        before = store.state_hash()
        with pytest.raises(ConfigError, match="in use"):
            async with open_store(*arguments):
                pass
    async with open_store(*arguments) as store:
        assert store.state_hash() == before
        assert store.members.get(world.owner.peer_id) == record("owner")


async def test_an_error_in_the_block_is_not_wrapped(world, network):
    station = network.station(world.owner.peer_id)
    with pytest.raises(KeyError):
        async with open_store(
            StoreConfig(),
            NOWHERE,
            world.owner,
            world.mesh,
            station,
            station,
            lambda: world.now,
            Counters(),
            storage=MemoryStorage(),
        ):
            raise KeyError("mine")


async def test_a_write_during_closing_is_on_disk_or_refused(
    world, network, autojump_clock
):
    station, disk = network.station(world.owner.peer_id), MemoryStorage()
    key = f"m/{world.owner.peer_id}"
    outcomes: list[str] = []

    async def write(store, number: int) -> None:
        await trio.sleep(number / 100)
        try:
            entry = await store.put(f"j/{number}/st", b"", 0)
        except Unavailable:
            outcomes.append("refused")
        else:
            assert entry.raw in disk.load()
            outcomes.append("kept")

    async with trio.open_nursery() as nursery:
        async with open_store(
            StoreConfig(),
            NOWHERE,
            world.owner,
            world.mesh,
            station,
            station,
            lambda: world.now,
            Counters(),
            storage=disk,
        ) as store:
            store.ingest_authority_untrusted(world.authority())
            await store.put(key, b"", 0)
            for number in range(12):
                nursery.start_soon(write, store, number)
            await trio.sleep(0.055)
    assert len(outcomes) == 12
    assert {"kept", "refused"} == set(outcomes)
