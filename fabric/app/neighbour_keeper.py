"""Close connections that are of no use, when there are too many, and both sides agree.

    we: surplus, idle      "node.release" ->
                           <- yes: not chosen there either, and idle; it is retired
    retired on both sides, so nobody takes its end for a loss; then the control
    connection goes

Each side drains: calls that run come to their end, the next one dials anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from fabric.app.neighbours import Neighbours
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, short
from fabric.net.host import Host
from fabric.net.pacing import SocketRegistry
from fabric.net.rpc import RpcService

log = logging.getLogger(__name__)

RELEASE = "node.release"
"""RPC method: may this connection go? The answer is YES or nothing."""
YES, MUST = b"\x01", b"\x02"
MAX_RELEASES = 8
"""Connections given up at one look."""
ASK_SECONDS = 3.0
DRAIN_SECONDS = 6.0
"""Longest wait for a retired connection's end before the control connection goes."""
LOOKS_PER_IDLE = 6
"""Looks in the time after which a connection is idle."""
DRAIN_LOOKS = 24


class Hood(Protocol):
    """Knows who our neighbours are."""

    core: Neighbours

    def current(self) -> frozenset[PeerId]:
        """Return with whom to have a standing connection."""
        ...


class NeighbourKeeper:
    """Keeps the number of idle connections within the bound. Run :meth:`run` in a task.

    Args:
        hood: Who is a neighbour.
        host: Control connections.
        rpc: RPC connections; :data:`RELEASE` is registered on it.
        registry: Data-plane sockets.
        kept: Peers whose connections are needed although idle: of jobs, of relays.
        idle_seconds: After how long without use a connection may go.
    """

    def __init__(
        self,
        hood: Hood,
        host: Host,
        rpc: RpcService,
        registry: SocketRegistry,
        kept: Callable[[], frozenset[PeerId]],
        idle_seconds: float,
    ) -> None:
        self._hood = hood
        self._host = host
        self._rpc = rpc
        self._registry = registry
        self._kept = kept
        self._patience = idle_seconds
        self._control_only: dict[PeerId, float] = {}
        self._refused_until: dict[PeerId, float] = {}
        self._leaving: set[PeerId] = set()
        rpc.register(RELEASE, self._on_release)

    async def run(self) -> None:
        """Look for surplus until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._patience / LOOKS_PER_IDLE)
                idle, chosen = self.idle(), self._hood.current()
                surplus = self._hood.core.surplus(idle, chosen, self._patience)
                must = self._hood.core.is_crowded(len(idle))
                for peer in surplus[:MAX_RELEASES]:
                    self._leaving.add(peer)
                    nursery.start_soon(self._release, peer, must)

    def idle(self) -> dict[PeerId, float]:
        """Return for how long each member's connections were of no use; 0: in use."""
        now, live = trio.current_time(), self._rpc.connected()
        control = (self._host.connected() & self._hood.core.members) - live
        self._control_only = {p: self._control_only.get(p, now) for p in control}
        self._refused_until = {p: t for p, t in self._refused_until.items() if t > now}
        found = {peer: now - since for peer, since in self._control_only.items()}
        found |= {peer: self._rpc.idle_seconds(peer) or 0.0 for peer in live}
        busy = self._in_use() | self._refused_until.keys()
        return {
            peer: 0.0 if peer in busy else seconds
            for peer, seconds in found.items()
            if peer not in self._leaving
        }

    def _in_use(self) -> set[PeerId]:
        """Return whose connections jobs, relays or other sockets need."""
        busy = set(self._kept())
        for peer, traffic in self._registry.traffic().items():
            # the sockets of RPC are among them
            if sum(traffic.connections.values()) > self._rpc.num_connections(peer):
                busy.add(peer)
        return busy

    def _on_release(self, peer: PeerId, request: bytes) -> bytes:
        """Answer whether the connection with ``peer`` may go."""
        if request != MUST and not self._is_spare(peer):
            return b""
        self._rpc.retire(peer)
        return YES

    def _is_spare(self, peer: PeerId) -> bool:
        if peer in self._hood.current() or not self._hood.core.bounded:
            return False
        # the clocks of the two sides began one round trip apart, and look at times
        needed = self._patience / 2
        return self.idle().get(peer, self._patience) >= needed

    async def _release(self, peer: PeerId, must: bool) -> None:
        """End the connections with ``peer`` if it agrees, or must."""
        try:
            if peer in self._rpc.connected():
                if not await self._agrees(peer, must) and not must:
                    again = trio.current_time() + self._patience
                    self._refused_until[peer] = again
                    return
                self._rpc.retire(peer)
                await self._await_end(peer)
            if peer not in self._rpc.connected() and peer not in self._in_use():
                log.info("neighbour.released peer=%s", short(peer))
                await self._host.disconnect(peer)
        finally:
            self._leaving.discard(peer)

    async def _await_end(self, peer: PeerId) -> None:
        for _ in range(DRAIN_LOOKS):
            if not self._rpc.num_connections(peer):
                return
            await trio.sleep(DRAIN_SECONDS / DRAIN_LOOKS)

    async def _agrees(self, peer: PeerId, must: bool) -> bool:
        with trio.move_on_after(ASK_SECONDS):
            try:
                answer = await self._rpc.call(peer, RELEASE, MUST if must else b"")
            except FabricError as exc:  # an older version keeps them all
                log.debug("neighbour.kept peer=%s code=%s", short(peer), exc.code)
                return False
            return answer == YES
        return False
