"""Reconciliation over RPC: when, with whom, and within which bounds."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from crdt_store.config import StoreConfig
from crdt_store.messages import SYNC_METHOD, Ask
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from crdt_store.replica import Replica
from fabric.core.errors import FabricError, PeerTimeout
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import Counters
from fabric.net.rpc_api import Rpc

_LOG = logging.getLogger(__name__)
_MAX_RUNNING = 4
"""Sessions at once: after a mass reconnect the rest wait for a later look."""

Ingest = Callable[[Sequence[bytes], PeerId], Awaitable[None]]


class SyncReport(msgspec.Struct, frozen=True):
    """What one reconciliation cost, in requests and payload bytes."""

    requests: int
    sent_bytes: int
    received_bytes: int


class Reconciler:
    """Starts reconciliations and answers those of others."""

    def __init__(
        self,
        config: StoreConfig,
        replica: Replica,
        rpc: Rpc,
        ingest: Ingest,
        counters: Counters,
        rng: random.Random,
        num_members: Callable[[], int],
        on_synced: Callable[[], None],
    ) -> None:
        self._config = config
        self._replica = replica
        self._rpc = rpc
        self._ingest = ingest
        self._counters = counters
        self._rng = rng
        self._num_members = num_members
        self._on_synced = on_synced
        self._running: set[PeerId] = set()
        self._seen: frozenset[PeerId] = frozenset()
        rpc.register_async(SYNC_METHOD, self.serve_untrusted)

    async def serve_untrusted(self, peer: PeerId, data: bytes) -> bytes:
        """Answer one request of ``peer``.

        Raises:
            RemoteProtocolError: malformed.
        """
        request = parse_request_untrusted(data)
        if isinstance(request, Ask) and request.entries:
            await self._ingest(request.entries, peer)
        return answer(self._replica, request)

    async def sync_with(self, peer: PeerId) -> SyncReport:
        """Reconcile with ``peer``; both then hold the union of what is valid.

        After cancellation whatever arrived is kept.

        Raises:
            Unavailable: the peer left or was slow.
            RemoteProtocolError: the peer answered with nonsense.
            RemoteRefused: the peer declined.
        """
        self._running.add(peer)
        sent = received = 0
        session = Session(self._replica)
        try:
            with trio.fail_after(self._config.sync_timeout_seconds):
                while (request := session.next_request()) is not None:
                    response = await self._rpc.call(peer, SYNC_METHOD, request)
                    sent, received = sent + len(request), received + len(response)
                    await self._ingest(session.receive_untrusted(response), peer)
        except trio.TooSlowError as exc:
            raise PeerTimeout(
                f"reconciliation with {short(peer)} took too long"
            ) from exc
        finally:
            self._running.discard(peer)
        self._on_synced()
        self._counters.add("store_syncs_total")
        self._counters.add("store_sync_bytes", sent + received)
        return SyncReport(session.num_requests, sent, received)

    async def run(self) -> None:
        """Reconcile with each new connection, and with a random peer per period."""
        next_round = trio.current_time() + self._period()
        async with trio.open_nursery() as nursery:
            while True:
                connected = self._rpc.connected()
                for peer in connected - self._seen:
                    if len(self._running) < _MAX_RUNNING:
                        self._seen |= {peer}
                        self._begin(nursery, peer)
                self._seen &= connected
                if trio.current_time() >= next_round:
                    next_round = trio.current_time() + self._period()
                    idle = sorted(connected - self._running)
                    if idle and len(self._running) < _MAX_RUNNING:
                        self._begin(nursery, self._rng.choice(idle))
                await trio.sleep(self._config.connect_poll_seconds)

    def _period(self) -> float:
        grown = self._num_members() * self._config.sync_seconds_per_member
        return max(self._config.sync_period_seconds, grown)

    def _begin(self, nursery: trio.Nursery, peer: PeerId) -> None:
        self._running.add(peer)
        nursery.start_soon(self._try, peer)

    async def _try(self, peer: PeerId) -> None:
        try:
            await self.sync_with(peer)
        except FabricError as exc:
            self._counters.add("store_sync_failures_total", label=exc.code)
            _LOG.debug("store.sync_failed peer=%s reason=%s", short(peer), exc.reason)
        finally:
            self._running.discard(peer)
