"""Hop requests of a client, and circuits as streams and as sockets."""

from __future__ import annotations

import math
import socket

import trio
from typing_extensions import override

from fabric.core.errors import (
    NoRoute,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.net.delimited import receive_message_untrusted, send_bytes
from fabric.net.traversal_api import TraversalHost
from nat.relay.messages import (
    MAX_RELAY_MESSAGE_BYTES,
    PROTOCOL_HOP,
    PROTOCOL_STOP,
    UNLIMITED,
    HopConnect,
    HopMessage,
    HopReserve,
    HopStatus,
    Limit,
    Status,
    StopConnect,
    StopStatus,
    decode_hop_untrusted,
    decode_stop_untrusted,
    encode_hop,
    encode_stop,
    status_name,
)
from nat.relay.pump_service import break_stream, pump

DATA_PREFIX = b"\x00fabric-data\n"
"""First bytes of a circuit for the data plane.

A control connection starts with the length of a multistream message, which is not 0.
"""
CONTROL_FIRST = b"\x13"
"""First byte of a control connection: the length of "/multistream/1.0.0\\n"."""


async def reserve(host: TraversalHost, relay: PeerId) -> HopStatus:
    """Return ``relay``'s OK to our request for a reservation.

    Raises:
        FabricError: it is gone, refused, or made no sense.
    """
    stream, answer = await _ask(host, relay, HopReserve())
    await stream.aclose()
    if answer.reservation is None:
        raise RemoteProtocolError(f"relay {short(relay)} granted no reservation")
    return answer


async def connect(
    host: TraversalHost, relay: PeerId, peer: PeerId, protocol: str = PROTOCOL_HOP
) -> tuple[trio.abc.Stream, HopStatus]:
    """Return a circuit to ``peer`` through ``relay``, and the relay's OK.

    Raises:
        FabricError: the relay is gone, refused, or made no sense.
    """
    return await _ask(host, relay, HopConnect(peer), protocol)


async def _ask(
    host: TraversalHost,
    relay: PeerId,
    request: HopMessage,
    protocol: str = PROTOCOL_HOP,
) -> tuple[trio.abc.Stream, HopStatus]:
    stream = await host.open_stream(relay, protocol)
    try:
        await send_bytes(stream, encode_hop(request))
        body = await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
        answer = decode_hop_untrusted(body)
        if not isinstance(answer, HopStatus):
            raise RemoteProtocolError(f"relay {short(relay)} asks instead of answering")
        if answer.status != Status.OK:
            raise _refusal(relay, answer.status)
    except BaseException:
        await break_stream(stream)
        raise
    return stream, answer


async def open_stop(
    host: TraversalHost, target: PeerId, source: PeerId, limit: Limit = UNLIMITED
) -> trio.abc.Stream:
    """Return the stream that ``target`` accepted as its end of a circuit of ``source``.

    Raises:
        FabricError: it is gone, did not accept, or made no sense.
    """
    stream = await host.open_stream(target, PROTOCOL_STOP)
    try:
        await send_bytes(stream, encode_stop(StopConnect(source, limit)))
        body = await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
        answer = decode_stop_untrusted(body)
        if not isinstance(answer, StopStatus) or answer.status != Status.OK:
            raise NoRoute(f"{short(target)} did not accept a circuit")
    except BaseException:
        await break_stream(stream)
        raise
    return stream


_KINDS: dict[int, tuple[type[NoRoute | RemoteRefused | ResourceExhausted], str]] = {
    Status.NO_RESERVATION: (NoRoute, "the peer holds no reservation there any more"),
    Status.CONNECTION_FAILED: (NoRoute, "the peer did not accept"),
    Status.PERMISSION_DENIED: (RemoteRefused, "it does not relay for us"),
    Status.RESERVATION_REFUSED: (RemoteRefused, "it has no room for reservations"),
    Status.RESOURCE_LIMIT_EXCEEDED: (RemoteRefused, "it has no room for circuits"),
}


def _refusal(relay: PeerId, status: int) -> NoRoute | RemoteRefused | ResourceExhausted:
    kind, meaning = _KINDS.get(status, (RemoteRefused, "it refused"))
    name = status_name(status)
    return kind(
        f"relay {short(relay)}: {meaning} ({name})",
        code=f"E_RELAY_{name}",
        next_step="another relay is tried by itself; `fabric doctor` lists them",
    )


class AdoptableStream(trio.abc.HalfCloseableStream):
    """A stream with bytes put back in front, whose end can be waited for.

    Attributes:
        closed: Set once its owner has closed it.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, first: bytes) -> None:
        self.closed = trio.Event()
        self._stream = stream
        self._first = first

    @override
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``."""
        await self._stream.send_all(data)

    @override
    async def wait_send_all_might_not_block(self) -> None:
        """Do as the stream does."""
        await self._stream.wait_send_all_might_not_block()

    @override
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return the bytes put back, then what arrives."""
        if self._first:
            await trio.lowlevel.checkpoint()
            size = len(self._first) if max_bytes is None else max_bytes
            first, self._first = self._first[:size], self._first[size:]
            return first
        return bytes(await self._stream.receive_some(max_bytes))

    @override
    async def send_eof(self) -> None:
        """Finish our direction."""
        await self._stream.send_eof()

    @override
    async def aclose(self) -> None:
        """Close the stream."""
        self.closed.set()
        await self._stream.aclose()


async def first_bytes_untrusted(stream: trio.abc.HalfCloseableStream) -> bytes:
    """Return enough of ``stream`` to tell what it is for; bound it at the call site.

    Raises:
        RemoteProtocolError: it is for nothing that we know.
        Unavailable: it ended or broke.
    """
    data = b""
    try:
        while len(data) < len(DATA_PREFIX):
            part = bytes(await stream.receive_some(len(DATA_PREFIX) - len(data)))
            if not part:
                raise Unavailable("the circuit ended before it said what it is for")
            data += part
            if data.startswith(CONTROL_FIRST):
                return data
            if not DATA_PREFIX.startswith(data):
                raise RemoteProtocolError("a circuit for nothing that we know")
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise Unavailable(f"the circuit broke: {exc}") from exc
    return data


def socket_ends() -> tuple[trio.SocketStream, socket.socket]:
    """Return a socket pair: our end as a stream, the user's end non-blocking."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ours.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours)), theirs


async def join(circuit: trio.abc.HalfCloseableStream, local: trio.SocketStream) -> None:
    """Carry bytes between a circuit and our end of a socket pair until they end.

    Whoever breaks is noticed at the other end: a circuit that broke closes the socket
    pair in the middle of what TLS carries, which its user tells from an orderly end.
    """
    complete = False
    try:
        complete = await pump(local, circuit, lambda *_: 0.0, idle_seconds=math.inf)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        local.socket.close()
        if not complete:
            await break_stream(circuit)
    await circuit.aclose()
