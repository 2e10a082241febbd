"""A store and its disk: restarts, failures, closing, clocks set back."""

from __future__ import annotations

import pytest
import trio

from crdt_store.config import StoreConfig
from crdt_store.grants import GRANT_PREFIX
from crdt_store.memory_storage import MemoryStorage
from crdt_store.replica import Replica
from crdt_store.roles import Role
from crdt_store.service import open_store
from fabric.core.errors import (
    ConfigError,
    LocalProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.telemetry import Counters
from tests.crdt_store.peers import NOWHERE, Peers, record, until


class Recording(MemoryStorage):
    """Keeps what each transaction holds; refuses them while ``full``."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.written: list[set[str]] = []

    def write(self, upserts, deletes, evidence=()) -> None:
        if self.full:
            raise ResourceExhausted("no space", code="E_DISK_FULL")
        self.written.append({entry.key for entry in upserts})
        super().write(upserts, deletes, evidence)


async def test_a_full_disk_refuses_the_write_and_loses_nothing(
    peers, world, autojump_clock
):
    disk = Recording()
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


@pytest.mark.parametrize("fails_first", [False, True])
async def test_a_write_is_never_on_disk_before_the_grant_it_rests_on(
    peers, world, autojump_clock, fails_first
):
    """A kill between two transactions would leave an entry that a restart voids."""
    disk, me = Recording(), world.workers[0]
    store = await peers.open(me, storage=disk, known=False)
    disk.full = fails_first
    store.ingest_authority_untrusted(world.authority())
    if fails_first:
        with pytest.raises(ResourceExhausted):
            await store.members.put(record("refused"))
        disk.full = False
    await store.members.put(record("kept"))
    assert {GRANT_PREFIX + me.peer_id, f"m/{me.peer_id}"} <= disk.written[0]
    # what one transaction more or less would leave is what a restart finds
    after = Replica(world.mesh, me.public_key)
    after.restore(disk.load(), world.now)
    assert f"m/{me.peer_id}" in {entry.key for entry in after.slots}


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


async def test_promises_outlive_the_store(world, network, autojump_clock):
    disk = MemoryStorage()
    async with trio.open_nursery() as nursery:
        store = await Peers(world, network, nursery).open(world.owner, storage=disk)
        await store.promises.save("job", 3, b"three")
        with pytest.raises(LocalProtocolError, match="promised 3"):
            await store.promises.save("job", 2, b"two")
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        store = await Peers(world, network, nursery).open(world.owner, storage=disk)
        assert store.promises.get("job").blob == b"three"
        await store.promises.forget(frozenset({"job", "unknown"}))
        assert store.promises.all() == disk.load_promises() == {}
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
