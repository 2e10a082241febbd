"""Eager push of entries over the mesh's topic: fast and lossy.

Whatever a push does not reach, reconciliation repairs; so every bound here may drop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from crdt_store.config import StoreConfig
from crdt_store.entry import Entry
from crdt_store.messages import PUSH
from crdt_store.push_queue import PushQueue
from fabric.core.errors import RemoteProtocolError, ResourceExhausted, Unavailable
from fabric.core.ids import MeshId, PeerId
from fabric.core.telemetry import DROPPED, PROTOCOL_ERRORS, Counters
from fabric.net.ports import Broadcast

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
        self._queue = PushQueue(config)
        self._wake = trio.Event()

    def push(self, entry: Entry) -> None:
        """Send ``entry`` soon; a later one of its slot takes its place."""
        if not self._queue.add(entry, trio.current_time()):
            self._counters.add(DROPPED, label="store_push")
        self._wake.set()

    async def run_push(self) -> None:
        """Send what the queue gives, when it gives it, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while (due := self._queue.next_at) is not None:
                await trio.sleep_until(due)
                payload = self._queue.take(trio.current_time())
                if payload is not None:
                    await self._publish(payload)

    async def _publish(self, payload: bytes) -> None:
        try:
            with trio.move_on_after(self._config.sync_timeout_seconds):
                await self._broadcast.publish(self._topic, payload)
        except (Unavailable, ResourceExhausted):
            self._counters.add(DROPPED, label="store_push")

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
