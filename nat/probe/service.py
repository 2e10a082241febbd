"""Link probing over bulk connections: implements ``fabric.net.ports.LinkProbe``."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import cast

import trio

from fabric.bulk.tls import tls_errors
from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    PeerTimeout,
    RemoteProtocolError,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.pacing import PeerTraffic
from fabric.net.paths_api import BulkPaths, BulkSocket, Paths
from fabric.net.ports import LinkMeasurement
from fabric.net.rpc_api import Rpc
from fabric.net.traversal_api import ConnectionKind
from nat.probe.config import ProbeConfig
from nat.probe.core import ProbeAllowance, ProbeBook
from nat.probe.wire import Exchange, Rates

logger = logging.getLogger(__name__)

SERVICE = "probe"
WATCH_SECONDS = 1.0
"""Traffic is looked at this often: peaks shorter than that are bursts."""
_UNKNOWN_RTT_SECONDS = 0.05
_KINDS = ("direct", "punched", "relay")
Traffic = Callable[[], dict[PeerId, PeerTraffic]]


@dataclass(frozen=True)
class LinkSenses:
    """What is known of links without probing.

    Attributes:
        rpc: Round-trip times.
        paths: The kind of path in use.
        traffic: What each link carries now: ``SocketRegistry.traffic``.
    """

    rpc: Rpc
    paths: Paths
    traffic: Traffic


@asynccontextmanager
async def open_link_probe(
    config: ProbeConfig,
    me: PeerId,
    bulk: BulkPaths,
    senses: LinkSenses,
    counters: Counters,
    rng: random.Random,
) -> AsyncIterator[ProbeService]:
    """Serve probes of members and measure our links with those set as members.

    Args:
        config: Ages and limits.
        me: Our PeerId.
        bulk: Carries the bursts; its gate decides who may have itself probed.
        senses: What is known of links without probing.
        counters: Refused probes, protocol errors.
        rng: Spreads the probes.
    """
    service = ProbeService(config, me, bulk, senses, counters, rng)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        yield service
        nursery.cancel_scope.cancel()


class ProbeService:
    """Measures one link at a time; made by :func:`open_link_probe`."""

    def __init__(
        self,
        config: ProbeConfig,
        me: PeerId,
        bulk: BulkPaths,
        senses: LinkSenses,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._bulk = bulk
        self._rpc = senses.rpc
        self._paths = senses.paths
        self._traffic = senses.traffic
        self._counters = counters
        self._book = ProbeBook(me, config, rng)
        self._allowance = ProbeAllowance(config)
        self._one = trio.Lock()
        self._guard = threading.Lock()  # of what bulk's threads share
        self._served: set[PeerId] = set()
        self._token = trio.lowlevel.current_trio_token()
        bulk.serve_bulk(SERVICE, self._serve)

    def set_members(
        self, members: Iterable[PeerId], near: Collection[PeerId] = frozenset()
    ) -> None:
        """Keep the links with these peers measured (at most ``config.max_links``)."""
        self._book.set_members(members, trio.current_time(), near)

    def link(self, peer: PeerId) -> LinkMeasurement | None:
        """Return the last measurement of the link with ``peer``, or None."""
        return self._book.link(peer)

    def links(self) -> dict[PeerId, LinkMeasurement]:
        """Return every measurement known."""
        return self._book.links()

    async def measure(self, peer: PeerId) -> LinkMeasurement:
        """Return a measurement no older than the configured age; probes if need be.

        Raises:
            Unavailable: the peer cannot be reached, or serves no probe now.
        """
        async with self._one:
            known = self._book.link(peer)
            if known is not None and self._book.is_fresh(peer, trio.current_time()):
                return known
            return await self._measure(peer)

    async def run(self) -> None:
        """Keep the links of members measured until cancelled."""
        while True:
            await trio.sleep(WATCH_SECONDS)
            traffic = self._traffic()
            for peer, moved in traffic.items():
                up, down = moved.up_bytes_per_second, moved.down_bytes_per_second
                self._book.note_traffic(peer, up, down)
            peer_due = self._book.due(trio.current_time())
            if peer_due is None:
                continue
            try:
                async with self._one:
                    await self._measure(peer_due)
            except FabricError as exc:
                logger.info("probe.failed peer=%s code=%s", short(peer_due), exc.code)

    async def _measure(self, peer: PeerId) -> LinkMeasurement:
        moved = self._traffic().get(peer)
        rtt, path = self._rtt(peer), self._path(peer)
        now = trio.current_time()
        if moved is not None and self._book.is_busy(
            moved.up_bytes_per_second, moved.down_bytes_per_second
        ):
            self._book.note_traffic(
                peer, moved.up_bytes_per_second, moved.down_bytes_per_second
            )
            self._book.take_traffic(peer, rtt, path, now)
            known = self._book.link(peer)
            if known is not None:
                return known
        try:
            rates = await self._probe(peer, rtt)
        except FabricError:
            self._book.failed(peer, trio.current_time())
            raise
        return self._note(peer, rates)

    async def _probe(self, peer: PeerId, rtt: float) -> Rates:
        try:
            with trio.fail_after(self._config.deadline_seconds):
                sock = await self._bulk.dial_bulk(peer, SERVICE)
        except trio.TooSlowError as exc:
            raise PeerTimeout(f"no connection to probe {short(peer)}") from exc
        # abandoned, the exchange ends at its own deadline and closes the socket
        return await trio.to_thread.run_sync(
            _ask, _as_socket(sock), self._config, rtt, abandon_on_cancel=True
        )

    def _serve(self, sock: BulkSocket, peer: PeerId) -> None:
        """Answer one probe; runs in a thread of the bulk service."""
        with self._guard:
            if peer in self._served:  # one at a time: a thread is held for each
                self._counters.add(REFUSALS, label="E_BUSY")
                return
            self._served.add(peer)
        try:
            exchange = Exchange(_as_socket(sock), self._config)
            rtt = self._rpc.rtt_seconds(peer) or _UNKNOWN_RTT_SECONDS
            rates = exchange.answer(lambda: self._may_serve(peer), rtt)
        except RemoteProtocolError:
            self._counters.add(PROTOCOL_ERRORS, label="probe")
            raise
        finally:
            with self._guard:
                self._served.discard(peer)
        if rates is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._note, peer, rates)

    def _may_serve(self, peer: PeerId) -> float:
        with self._guard:
            wait = self._allowance.take(peer, time.monotonic())
        if wait > 0:
            self._counters.add(REFUSALS, label="E_BUSY")
        return wait

    def _note(self, peer: PeerId, rates: Rates) -> LinkMeasurement:
        link = LinkMeasurement(
            rtt_seconds=self._rtt(peer),
            up_bytes_per_second=rates.up,
            down_bytes_per_second=rates.down,
            measured_at=trio.current_time(),
            path=self._path(peer),
        )
        self._book.measured(peer, link, link.measured_at)
        return link

    def _rtt(self, peer: PeerId) -> float:
        return self._rpc.rtt_seconds(peer) or _UNKNOWN_RTT_SECONDS

    def _path(self, peer: PeerId) -> ConnectionKind:
        kind = self._paths.kind(peer)
        return cast(ConnectionKind, kind) if kind in _KINDS else "direct"


def _ask(sock: socket.socket, config: ProbeConfig, rtt: float) -> Rates:
    with tls_errors(), sock:
        return Exchange(sock, config).ask(rtt)


def _as_socket(sock: BulkSocket) -> socket.socket:
    if not isinstance(sock, socket.socket):
        raise LocalProtocolError(f"cannot probe over a {type(sock).__name__}")
    return sock
