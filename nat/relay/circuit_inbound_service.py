"""Inbound circuits: the stop protocol.

Two kinds, told apart by their first bytes: control connections, over which the host
runs its security and muxer, and data-plane connections, which carry TLS between daemons
or workers. The relay names the peer at the other end; that is a claim. A control
connection proves it at once, a data connection by its label and certificate; until then
the claim is good for refusing early and for nothing else.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from fabric.core.errors import FabricError, RemoteProtocolError, RemoteRefused
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.delimited import receive_message_untrusted, send_bytes
from fabric.net.ports import PROTOCOL_OFFER, Gate
from fabric.net.traversal_api import ConnectionInfo, TraversalHost
from nat.relay.circuit_streams_service import (
    DATA_PREFIX,
    AdoptableStream,
    first_bytes_untrusted,
    join,
    socket_ends,
)
from nat.relay.config import CircuitConfig
from nat.relay.messages import (
    MAX_RELAY_MESSAGE_BYTES,
    PROTOCOL_STOP,
    Status,
    StopConnect,
    StopStatus,
    decode_stop_untrusted,
    encode_stop,
)

log = logging.getLogger(__name__)


class InboundCircuits:
    """Serves stop streams; a handler runs in the task of its stream.

    Args:
        host: Adopts control connections.
        gate: Who may open data-plane circuits.
        config: Numbers and times.
        counters: Where refusals are counted.
        expects: Whether circuits may come from a relay.
        on_data: Owns an inbound data-plane socket and its claimed peer.
    """

    def __init__(
        self,
        host: TraversalHost,
        gate: Gate,
        config: CircuitConfig,
        counters: Counters,
        expects: Callable[[PeerId], bool],
        on_data: Callable[[PeerId, socket.socket], Awaitable[None]],
    ) -> None:
        self._host = host
        self._gate = gate
        self._config = config
        self._counters = counters
        self._expects = expects
        self._on_data = on_data
        # circuits by relay and by claimed peer, until they are a control connection
        self._open: Counter[tuple[str, PeerId]] = Counter()

    async def serve(self, relay: PeerId, stream: trio.abc.Stream) -> None:
        """Serve one circuit until its end.

        Raises:
            FabricError: refused, malformed, or not who it claims to be.
        """
        assert isinstance(stream, trio.abc.HalfCloseableStream)
        with trio.fail_after(self._config.first_bytes_seconds):
            body = await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
            request = decode_stop_untrusted(body)
            if not isinstance(request, StopConnect):
                raise RemoteProtocolError(f"{PROTOCOL_STOP} starts with a status")
            peer = request.peer
            status = self._judge(relay, peer)
            if status != Status.OK:
                await send_bytes(stream, encode_stop(StopStatus(status)))
                return
        with self._slot(relay, peer):
            with trio.fail_after(self._config.first_bytes_seconds):
                await send_bytes(stream, encode_stop(StopStatus(Status.OK)))
                first = await first_bytes_untrusted(stream)
            if first == DATA_PREFIX:
                await self._serve_data(peer, stream)
                return
        await self._serve_control(relay, peer, stream, first)

    def _judge(self, relay: PeerId, peer: PeerId) -> Status:
        if not self._expects(relay) or peer == self._host.peer_id:
            return self._refused(Status.PERMISSION_DENIED, "E_CIRCUIT_UNEXPECTED")
        config = self._config
        from_relays = sum(n for (kind, _), n in self._open.items() if kind == "relay")
        full = (
            from_relays >= config.max_inbound
            # half of them: no relay of two can use up all by making up names
            or self._open["relay", relay] >= (config.max_inbound + 1) // 2
            or self._open["peer", peer] >= config.max_inbound_per_peer
        )
        if full:
            return self._refused(Status.RESOURCE_LIMIT_EXCEEDED, "E_CIRCUITS_FULL")
        return Status.OK

    def _refused(self, status: Status, code: str) -> Status:
        self._counters.add(REFUSALS, label=code)
        return status

    @contextmanager
    def _slot(self, relay: PeerId, peer: PeerId) -> Iterator[None]:
        keys = (("relay", relay), ("peer", peer))
        self._open.update(keys)
        try:
            yield
        finally:
            self._open.subtract(keys)
            for key in keys:
                if not self._open[key]:
                    del self._open[key]

    async def _serve_control(
        self,
        relay: PeerId,
        peer: PeerId,
        stream: trio.abc.HalfCloseableStream,
        first: bytes,
    ) -> None:
        """Give the circuit to the host, and wait: the stream ends with its handler."""
        adoptable = AdoptableStream(stream, first)
        info = ConnectionInfo(kind="relay", outbound=False, relay=relay)
        await self._host.adopt(peer, adoptable, info)
        await adoptable.closed.wait()

    async def _serve_data(
        self, peer: PeerId, stream: trio.abc.HalfCloseableStream
    ) -> None:
        decision = self._gate.allows(peer, PROTOCOL_OFFER)
        if not decision.allowed:
            self._counters.add(REFUSALS, label=decision.code or "E_REFUSED")
            raise RemoteRefused(decision.reason, code=decision.code)
        local, theirs = socket_ends()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, peer, theirs)
            await join(stream, local)

    async def _deliver(self, peer: PeerId, sock: socket.socket) -> None:
        try:
            await self._on_data(peer, sock)
        except FabricError as exc:
            log.debug("circuit.data peer=%s reason=%s", short(peer), exc.reason)
            sock.close()
