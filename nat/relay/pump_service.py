"""Messages in front of a relayed stream, and the pump that joins two streams.

A hop or stop stream starts with one message each way and then *is* the circuit, so a
reader takes the message and not a byte more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import trio

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.protobuf import decode_varint_untrusted

PIECE_BYTES = 64 * 1024
"""What the pump holds of one direction."""
_MAX_LENGTH_BYTES = 3
"""A length below 2**21."""


@runtime_checkable
class Breakable(Protocol):
    """A stream that can be reset, which the other end tells from an orderly end."""

    def abort(self) -> None:
        """Break both directions at once, without waiting."""
        ...


async def break_stream(stream: trio.abc.Stream) -> None:
    """Close ``stream`` so that the other end notices that it is not complete."""
    if isinstance(stream, Breakable):
        stream.abort()
    else:
        await trio.aclose_forcefully(stream)


async def send_message(stream: trio.abc.Stream, data: bytes) -> None:
    """Send ``data``, which has its length in front.

    Raises:
        Unavailable: the stream broke.
    """
    try:
        await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise Unavailable(f"the stream broke: {exc}") from exc


async def receive_message_untrusted(stream: trio.abc.Stream, max_bytes: int) -> bytes:
    """Return the body of the next message; bound it at the call site.

    Raises:
        RemoteProtocolError: its length is malformed or above ``max_bytes``.
        Unavailable: the stream ended or broke before its end.
    """
    try:
        head = b""
        while not head or head[-1] & 0x80:
            if len(head) == _MAX_LENGTH_BYTES:
                raise RemoteProtocolError("message with an endless length")
            head += await _some(stream, 1)
        size, _ = decode_varint_untrusted(head)
        if size > max_bytes:
            raise RemoteProtocolError(f"message of {size} B > {max_bytes} B")
        body = b""
        while len(body) < size:
            body += await _some(stream, size - len(body))
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise Unavailable(f"the stream broke: {exc}") from exc
    return body


async def _some(stream: trio.abc.Stream, max_bytes: int) -> bytes:
    data = bytes(await stream.receive_some(max_bytes))
    if not data:
        raise Unavailable("the stream ended before its message")
    return data


Take = Callable[[int, int], float]
"""Given a direction (0 or 1) and a number of bytes: seconds to wait before sending.

Raises what ends the pump.
"""


async def pump(
    source: trio.abc.HalfCloseableStream,
    target: trio.abc.HalfCloseableStream,
    take: Take,
    *,
    idle_seconds: float,
    ends_at: Callable[[], float] = lambda: math.inf,
) -> bool:
    """Carry bytes both ways until both have ended; return whether they did.

    An end is passed on and the other direction goes on. Neither stream is closed. One
    piece of each direction is held: a reader that stalls stalls its writer.

    Args:
        source: One side; its bytes are direction 0.
        target: The other.
        take: Asked about each piece.
        idle_seconds: Stop when nothing was carried for this long.
        ends_at: Stop then, in any case; asked at the start and with each piece.

    Raises:
        BrokenResourceError: a side broke.
    """
    start = trio.current_time() + idle_seconds
    with trio.CancelScope(deadline=min(start, ends_at())) as scope:

        async def carry(
            reader: trio.abc.HalfCloseableStream,
            writer: trio.abc.HalfCloseableStream,
            direction: int,
        ) -> None:
            while data := await reader.receive_some(PIECE_BYTES):
                wait = take(direction, len(data))
                idle_at = trio.current_time() + wait + idle_seconds
                scope.deadline = min(max(scope.deadline, idle_at), ends_at())
                if wait:
                    await trio.sleep(wait)
                await writer.send_all(data)
            await writer.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, source, target, 0)
            nursery.start_soon(carry, target, source, 1)
    return not scope.cancelled_caught
