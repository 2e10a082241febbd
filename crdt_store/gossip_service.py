"""Eager push of entries over the mesh's topic: fast and lossy.

Whatever a push does not reach, reconciliation repairs; so every bound here may drop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from crdt_store.config import StoreConfig
from crdt_store.entry import Entry, Slot
from crdt_store.messages import MAX_CARRIED, MAX_PUSH_BYTES, PUSH, Push
from fabric.core.errors import RemoteProtocolError, ResourceExhausted, Unavailable
from fabric.core.ids import MeshId, PeerId
from fabric.core.telemetry import DROPPED, PROTOCOL_ERRORS, Counters
from fabric.net.ports import Broadcast

_HEADER_BYTES = 8
"""msgpack header of one entry in a push, rounded up."""

Ingest = Callable[[Sequence[bytes], PeerId], Awaitable[None]]


def topic_of(mesh: MeshId) -> str:
    """Return the gossip topic of the entries of ``mesh``."""
    return f"fabric/store/{mesh}"


class Gossip:
    """Pushes our entries, takes in those of others."""

    def __init__(
        self,
        config: StoreConfig,
        mesh: MeshId,
        broadcast: Broadcast,
        ingest: Ingest,
        counters: Counters,
    ) -> None:
        self._config = config
        self._topic = topic_of(mesh)
        self._broadcast = broadcast
        self._ingest = ingest
        self._counters = counters
        self._backlog: dict[Slot, bytes] = {}
        self._wake = trio.Event()

    def push(self, entry: Entry) -> None:
        """Send ``entry`` soon; a later one of its slot takes its place."""
        full = len(self._backlog) >= self._config.max_push_backlog
        if full and entry.slot not in self._backlog:
            self._counters.add(DROPPED, label="store_push")
            return
        self._backlog[entry.slot] = entry.raw
        self._wake.set()

    async def run_push(self) -> None:
        """Send batches, paced, until cancelled."""
        while True:
            await self._wake.wait()
            await trio.sleep(self._config.push_batch_seconds)
            self._wake = trio.Event()
            while self._backlog:
                payload = PUSH.encode(Push(self._next_batch()))
                try:
                    with trio.move_on_after(self._config.sync_timeout_seconds):
                        await self._broadcast.publish(self._topic, payload)
                except (Unavailable, ResourceExhausted):
                    self._counters.add(DROPPED, label="store_push")
                await trio.sleep(self._config.push_interval_seconds)

    def _next_batch(self) -> tuple[bytes, ...]:
        batch: list[bytes] = []
        room = MAX_PUSH_BYTES
        for slot, raw in list(self._backlog.items()):
            room -= len(raw) + _HEADER_BYTES
            if room < 0 or len(batch) == MAX_CARRIED:
                break
            batch.append(raw)
            del self._backlog[slot]
        return tuple(batch)

    async def run_receive(
        self, pushes: trio.MemoryReceiveChannel[tuple[PeerId, bytes]]
    ) -> None:
        """Take in pushes until the channel closes."""
        async for forwarder, payload in pushes:
            try:
                message = PUSH.decode_untrusted(payload)
            except RemoteProtocolError:
                self._counters.add(PROTOCOL_ERRORS, label="store_push")
                continue
            await self._ingest(message.entries, forwarder)
