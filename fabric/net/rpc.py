"""The RPC service: one connection per peer, handlers for the peers' calls.

Of two connections with one peer the better stays and the other is drained, so that no
call breaks (``rpc_links.py``). That is also how a relayed connection becomes a direct
one (:meth:`RpcService.upgrade`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    PeerTimeout,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import BUGS, DROPPED, PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.data_config import RpcConfig
from fabric.net.ports import (
    ALL_PATHS,
    BETTER_THAN_RELAY,
    PROTOCOL_RPC,
    Gate,
    PathKind,
)
from fabric.net.rpc_api import AsyncHandler, Handler
from fabric.net.rpc_connection import RpcConnection
from fabric.net.rpc_core import RequestReceived
from fabric.net.rpc_links import Links
from fabric.net.tasks import collapse_group

logger = logging.getLogger(__name__)

LOST_EVENTS = 256
"""Lost peers a subscriber may lag behind; more are dropped and counted."""
MAX_SUBSCRIBERS = 32
"""Parts of one daemon that watch for lost peers."""


class Connector(Protocol):
    """Makes authenticated streams for RPC; the data plane does."""

    async def connect(
        self, peer: PeerId, kinds: Collection[PathKind]
    ) -> tuple[trio.abc.Stream, PathKind]:
        """Return a stream to ``peer`` on a path of ``kinds``, and which it is.

        Raises:
            Unavailable: no path.
            RemoteRefused: the peer's gate refuses us.
        """
        ...


class _Dial:
    """One attempt to connect, for which any number of callers wait."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: FabricError | None = None


@asynccontextmanager
async def open_rpc(
    config: RpcConfig,
    peer_id: PeerId,
    connector: Connector,
    gate: Gate,
    counters: Counters,
) -> AsyncIterator[RpcService]:
    """Run an RPC service; leaving closes every connection.

    Args:
        config: Limits and times.
        peer_id: Ours.
        connector: Dials peers.
        gate: Asked when a connection opens, whoever dialled.
        counters: Bugs, refusals, protocol errors, bytes.
    """
    service = RpcService(config, peer_id, connector, gate, counters)
    with collapse_group():
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            yield service
            nursery.cancel_scope.cancel()


class RpcService:
    """Implements ``rpc_api.Rpc``; made by :func:`open_rpc`.

    Attributes:
        meet: Awaited before a dial: brings the gate to know the peer.
        background: Methods whose calls do not count as use of a connection.
    """

    def __init__(
        self,
        config: RpcConfig,
        peer_id: PeerId,
        connector: Connector,
        gate: Gate,
        counters: Counters,
    ) -> None:
        self._config = config
        self._peer_id = peer_id
        self._connector = connector
        self._gate = gate
        self._counters = counters
        self._inline: dict[str, Handler] = {}
        self._async: dict[str, AsyncHandler] = {}
        self._links = Links()
        self._dials: dict[PeerId, _Dial] = {}
        self._lost: list[trio.MemorySendChannel[PeerId]] = []
        self._nursery: trio.Nursery | None = None
        self.meet: Callable[[PeerId], Awaitable[None]] | None = None
        self.background: frozenset[str] = frozenset()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own the tasks of all connections until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # what still arrives is refused: the nursery is about to take no more
                self._nursery = None

    def register(self, method: str, handler: Handler) -> None:
        """Answer ``method`` ("package.verb") inline."""
        self._check_free(method)
        self._inline[method] = handler

    def register_async(self, method: str, handler: AsyncHandler) -> None:
        """Answer ``method`` in a task of its own."""
        self._check_free(method)
        self._async[method] = handler

    async def call(self, peer: PeerId, method: str, request: bytes) -> bytes:
        """Return the peer's response; connects first if there is no connection.

        Bound it with ``trio.fail_after`` at the call site; without a deadline the
        default of the configuration (10 s) holds. On cancellation the peer is told.

        Raises:
            Unavailable: the peer cannot be reached, left, or was slow (PeerTimeout).
            RemoteRefused: the peer declined, with its code, reason and next step.
            ResourceExhausted: too much already waits for this peer.
        """
        connection = self._links.live(peer)
        if connection is None:
            connection = await self._connect(peer)
        return await connection.call(method, request)

    async def accept(
        self, peer: PeerId, stream: trio.abc.Stream, kind: PathKind = "direct"
    ) -> None:
        """Take over an inbound, authenticated ``stream`` of ``peer``."""
        try:
            self._add(peer, stream, peer, kind)
        except FabricError as exc:
            logger.info("rpc.refused peer=%s code=%s", short(peer), exc.code)
            await trio.aclose_forcefully(stream)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection with ``peer``: the gate's decision changed."""
        for connection in [c for c in self._links if c.peer == peer]:
            connection.end(Unavailable("disconnected"))
        await trio.lowlevel.checkpoint()

    def retire(self, peer: PeerId) -> None:
        """Do without a connection with ``peer``, which agreed to that.

        Open calls finish, the next one dials anew, and :meth:`lost` does not tell.
        """
        self._links.retire(peer)

    def num_connections(self, peer: PeerId) -> int:
        """Return how many connections with ``peer`` there are, also such as end."""
        return sum(connection.peer == peer for connection in self._links)

    def idle_seconds(self, peer: PeerId) -> float | None:
        """Return for how long nobody used the connection with ``peer``."""
        connection = self._links.live(peer)
        return connection.idle_seconds if connection is not None else None

    def doubt(self, peer: PeerId | None = None) -> None:
        """Ask ``peer`` (None: all) whether it is there: the path may be dead.

        A connection on which nothing arrives within ``doubt_seconds`` ends.
        """
        for connection in self._links:
            if peer in (None, connection.peer):
                connection.doubt()

    def silent(self, seconds: float) -> frozenset[PeerId]:
        """Return the peers whose live connection has brought nothing for so long."""
        found = {peer: self._links.live(peer) for peer in self._links.peers()}
        return frozenset(
            p for p, c in found.items() if c and c.silent_seconds >= seconds
        )

    def connected(self) -> frozenset[PeerId]:
        """Return the peers with a live RPC connection."""
        return self._links.peers()

    def lost(self) -> trio.MemoryReceiveChannel[PeerId]:
        """Return a new bounded channel of peers whose RPC connection just broke."""
        if len(self._lost) >= MAX_SUBSCRIBERS:
            raise LocalProtocolError(f"{MAX_SUBSCRIBERS} subscribers to lost peers")
        send, receive = trio.open_memory_channel[PeerId](LOST_EVENTS)
        self._lost.append(send)
        return receive

    def kind(self, peer: PeerId) -> PathKind | None:
        """Return what carries the connection with ``peer``, or None without one."""
        connection = self._links.live(peer)
        return connection.kind if connection is not None else None

    async def upgrade(self, peer: PeerId) -> None:
        """Move the connection with ``peer`` off its relay; open calls finish there.

        Does nothing when there is no connection or a better one already. Bound it with
        ``trio.fail_after`` at the call site.

        Raises:
            Unavailable: no better path now; NoRoute says why.
            RemoteRefused: the peer's gate refuses us.
        """
        if self.kind(peer) != "relay":
            return
        stream, kind = await self._connector.connect(peer, BETTER_THAN_RELAY)
        await self._adopt(peer, stream, kind)

    def rtt_seconds(self, peer: PeerId) -> float | None:
        """Return the smoothed round-trip time, or None when unknown."""
        connection = self._links.live(peer)
        return connection.rtt_seconds if connection is not None else None

    async def _connect(self, peer: PeerId) -> RpcConnection:
        if peer == self._peer_id:
            raise LocalProtocolError("call to ourselves")
        dial = self._dials.get(peer)
        if dial is None:
            if self._nursery is None:
                raise LocalProtocolError("the RPC service does not run")
            dial = self._dials[peer] = _Dial()
            self._nursery.start_soon(self._run_dial, peer, dial)
        # The dial belongs to the service: a cancelled caller does not stop it for the
        # others, and its own timeout bounds it.
        await dial.done.wait()
        if (connection := self._links.live(peer)) is not None:
            return connection
        if dial.error is not None:
            raise dial.error.with_traceback(None)
        raise Unavailable(f"connection with {peer} closed at once")

    async def _run_dial(self, peer: PeerId, dial: _Dial) -> None:
        try:
            with trio.fail_after(self._config.connect_timeout_seconds):
                if self.meet is not None:
                    await self.meet(peer)
                self._check_gate(peer)
                stream, kind = await self._connector.connect(peer, ALL_PATHS)
            await self._adopt(peer, stream, kind)
        except trio.TooSlowError:
            dial.error = PeerTimeout(f"no connection with {peer} in time")
        except FabricError as exc:
            dial.error = exc
        finally:
            del self._dials[peer]
            dial.done.set()

    async def _adopt(
        self, peer: PeerId, stream: trio.abc.Stream, kind: PathKind
    ) -> None:
        try:
            self._add(peer, stream, self._peer_id, kind)
        except FabricError:
            await trio.aclose_forcefully(stream)
            raise

    def _check_gate(self, peer: PeerId) -> None:
        decision = self._gate.allows(peer, PROTOCOL_RPC)
        if not decision.allowed:
            self._counters.add(REFUSALS, label=decision.code)
            raise Unavailable(
                decision.reason, code=decision.code, next_step=decision.next_step
            )

    def _add(
        self, peer: PeerId, stream: trio.abc.Stream, initiator: PeerId, kind: PathKind
    ) -> None:
        self._check_gate(peer)
        if len(self._links) >= self._config.max_connections:
            raise ResourceExhausted(f"{len(self._links)} RPC connections")
        if self._nursery is None:
            raise LocalProtocolError("the RPC service does not run")
        connection = RpcConnection(
            peer,
            stream,
            (initiator, kind),
            self._config,
            self._serve,
            self._counters,
            self.background,
        )
        self._links.add(connection)
        self._nursery.start_soon(self._run_connection, connection)

    async def _run_connection(self, connection: RpcConnection) -> None:
        peer = connection.peer
        try:
            reason = await connection.run()
        finally:
            self._links.remove(connection)
        if isinstance(reason, RemoteProtocolError):
            self._counters.add(PROTOCOL_ERRORS, label="rpc")
        logger.info("rpc.closed peer=%s reason=%s", short(peer), reason.reason)
        if self._links.live(peer) is None and not connection.retired:
            self._announce_lost(peer)

    def _announce_lost(self, peer: PeerId) -> None:
        for channel in list(self._lost):
            try:
                channel.send_nowait(peer)
            except trio.WouldBlock:
                self._counters.add(DROPPED, label="rpc_lost")
            except trio.BrokenResourceError:  # the subscriber closed its end
                self._lost.remove(channel)

    def _check_free(self, method: str) -> None:
        if method in self._inline or method in self._async:
            raise LocalProtocolError(f"method {method!r} has a handler already")

    def _serve(self, connection: RpcConnection, request: RequestReceived) -> None:
        """Answer a peer's call: the one boundary behind which anything may go wrong."""
        handler = self._inline.get(request.method)
        try:
            if handler is not None:
                answer = handler(connection.peer, request.payload)
                connection.respond(request.id, answer)
            elif request.method in self._async:
                connection.start_handler(
                    request, lambda r: self._serve_async(connection, r)
                )
            else:
                raise FabricError(
                    f"no method {request.method!r}",
                    code="E_NO_METHOD",
                    next_step="check that both peers run the same version",
                )
        except FabricError as exc:
            self._refuse(connection, request, exc)
        except Exception as exc:  # noqa: BLE001 - a peer must not crash a node
            self._on_bug(connection, request, exc)

    async def _serve_async(
        self, connection: RpcConnection, request: RequestReceived
    ) -> None:
        try:
            answer = await self._async[request.method](connection.peer, request.payload)
            connection.respond(request.id, answer)
        except FabricError as exc:
            self._refuse(connection, request, exc)
        except trio.TooSlowError:
            self._refuse(connection, request, PeerTimeout(f"{request.method} was slow"))
        except Exception as exc:  # noqa: BLE001 - a peer must not crash a node
            self._on_bug(connection, request, exc)

    def _refuse(
        self, connection: RpcConnection, request: RequestReceived, error: FabricError
    ) -> None:
        self._counters.add(REFUSALS, label=error.code)
        connection.refuse(request.id, error)

    def _on_bug(
        self, connection: RpcConnection, request: RequestReceived, error: Exception
    ) -> None:
        self._counters.add(BUGS)
        logger.error("rpc.bug method=%s", request.method, exc_info=error)
        reason = f"{request.method} failed: {type(error).__name__}"
        connection.refuse(request.id, FabricError(reason, code="E_BUG"))
        if self._config.raise_bugs:
            raise error
