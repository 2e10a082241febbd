"""Stores of several peers over a network in memory, in virtual time."""

from __future__ import annotations

from pathlib import Path

import trio

from crdt_store.config import StoreConfig
from crdt_store.memory_storage import MemoryStorage
from crdt_store.service import open_store
from crdt_store.views import Hardware, MemberRecord
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


async def until(condition) -> None:
    with trio.fail_after(120):
        while not condition():  # noqa: ASYNC110 (any condition)
            await trio.sleep(0.05)


def record(name: str) -> MemberRecord:
    return MemberRecord(
        name=name, addrs=("/ip4/127.0.0.1/tcp/1",), hardware=Hardware(2)
    )
