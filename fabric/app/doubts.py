"""Find out soon which connections are dead, when something says that some may be.

An uplink that changes behind a router tells nobody: this machine keeps its address, and
its connections fall silent. But some sign comes early. A public peer resets a
connection that now arrives from elsewhere; one peer is silent for two seconds, or dials
us anew; the kernel tells of a new address. Then connections are asked whether they are
alive, on both planes at once, and have two seconds to answer. What is alive stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from fabric.core.ids import PeerId, short
from fabric.net.data_plane import DataPlane
from fabric.net.host import PeerReconnected
from fabric.net.libp2p_host import Libp2pHost
from fabric.net.rpc import RpcService

log = logging.getLogger(__name__)

SILENT_SECONDS = 2.2
"""RPC pings every second: after this long two answers are missing."""
LOOK_SECONDS = 0.25
ALL_SECONDS = 2.0
"""All connections are asked no more often than this: one sign often brings more."""


class Doubts:
    """Passes doubt on to whoever has connections. Run :meth:`run` in a task.

    Args:
        host: Control connections.
        rpc: RPC connections; tells who was lost.
        plane: Data-plane sockets.
        doubt_spares: Passes it on to the punched sockets that nobody uses yet.
    """

    def __init__(
        self,
        host: Libp2pHost,
        rpc: RpcService,
        plane: DataPlane,
        doubt_spares: Callable[[PeerId], None],
    ) -> None:
        self._host = host
        self._rpc = rpc
        self._plane = plane
        self._doubt_spares = doubt_spares
        self._all_at = 0.0
        self._doubted: frozenset[PeerId] = frozenset()

    async def run(self) -> None:
        """Follow the signs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_lost)
            nursery.start_soon(self._follow_host)
            while True:
                await trio.sleep(LOOK_SECONDS)
                silent = self._rpc.silent(SILENT_SECONDS)
                for peer in silent - self._doubted:
                    log.info("doubt.silent peer=%s", short(peer))
                    self.about(peer)
                self._doubted = silent

    def about(self, peer: PeerId) -> None:
        """Doubt everything with ``peer`` but its RPC connection, which pings anyway."""
        self._host.doubt(peer)
        self._doubt_sockets(peer)

    def _doubt_sockets(self, peer: PeerId) -> None:
        self._plane.registry.doubt(peer, trio.current_time())
        self._doubt_spares(peer)

    def about_all(self) -> None:
        """Doubt every connection: our network may have changed."""
        now = trio.current_time()
        if now < self._all_at:
            return
        self._all_at = now + ALL_SECONDS
        peers = self._rpc.connected() | self._host.connected()
        log.info("doubt.all peers=%d", len(peers))
        self._rpc.doubt()
        for peer in peers:
            self.about(peer)

    async def _follow_lost(self) -> None:
        with self._rpc.lost() as lost:
            async for peer in lost:
                self.about(peer)
                self.about_all()

    async def _follow_host(self) -> None:
        with self._host.events() as events:
            async for event in events:
                if isinstance(event, PeerReconnected):
                    # the host itself asks the older control connections
                    self._rpc.doubt(event.peer)
                    self._doubt_sockets(event.peer)
