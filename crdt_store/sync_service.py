"""Reconciliation over RPC, when :class:`crdt_store.schedule.SyncSchedule` says so."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from crdt_store.config import StoreConfig
from crdt_store.messages import SALT_BYTES, SYNC_METHOD, Ask
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from crdt_store.replica import Replica
from crdt_store.schedule import SyncSchedule
from fabric.core.errors import FabricError, PeerTimeout
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import Counters
from fabric.net.rpc_api import Rpc

_LOG = logging.getLogger(__name__)

Ingest = Callable[[Sequence[bytes], PeerId], Awaitable[int]]
"""Takes in entries; returns how many were new."""


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
        self._num_members = num_members
        self._on_synced = on_synced
        self._schedule = SyncSchedule(config, rng, trio.current_time(), num_members())
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
        self._schedule.began(peer)
        sent = received = new = 0
        session = Session(self._replica, os.urandom(SALT_BYTES))
        try:
            with trio.fail_after(self._config.sync_timeout_seconds):
                while (request := session.next_request()) is not None:
                    response = await self._rpc.call(peer, SYNC_METHOD, request)
                    sent, received = sent + len(request), received + len(response)
                    new += await self._ingest(session.receive_untrusted(response), peer)
        except trio.TooSlowError as exc:
            raise PeerTimeout(
                f"reconciliation with {short(peer)} took too long"
            ) from exc
        finally:
            self._schedule.ended(peer, news=new > 0)
        self._on_synced()
        self._counters.add("store_syncs_total")
        self._counters.add("store_sync_bytes", sent + received)
        return SyncReport(session.num_requests, sent, received)

    async def run(self) -> None:
        """Reconcile with each new connection, and with a random peer per period."""
        async with trio.open_nursery() as nursery:
            while True:
                connected, members = self._rpc.connected(), self._num_members()
                for peer in self._schedule.due(trio.current_time(), connected, members):
                    nursery.start_soon(self._try, peer)
                await trio.sleep(self._config.connect_poll_seconds)

    async def _try(self, peer: PeerId) -> None:
        try:
            await self.sync_with(peer)
        except FabricError as exc:
            self._counters.add("store_sync_failures_total", label=exc.code)
            _LOG.debug("store.sync_failed peer=%s reason=%s", short(peer), exc.reason)
