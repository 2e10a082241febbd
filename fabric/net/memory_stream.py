"""A pair of memory streams with latency, bandwidth, backpressure, in trio's time."""

from __future__ import annotations

from collections import deque

import trio
from trio.abc import HalfCloseableStream
from typing_extensions import override

ROOM_BYTES = 256 * 1024
"""Bytes in flight per direction: the first window of a yamux stream."""
CHUNK_BYTES = 64 * 1024
"""A long send travels in pieces of this size, as frames do."""


class Link:
    """When bytes handed over now arrive at the other end.

    Args:
        latency_seconds: One way.
        bytes_per_second: Bandwidth; 0 = unlimited.
    """

    def __init__(self, latency_seconds: float, bytes_per_second: float) -> None:
        self._latency = latency_seconds
        self._rate = bytes_per_second
        self._busy_until = 0.0

    def arrival(self, num_bytes: int, now: float) -> float:
        """Return the time at which ``num_bytes`` sent at ``now`` have arrived."""
        if self._rate:
            self._busy_until = max(now, self._busy_until) + num_bytes / self._rate
            return self._busy_until + self._latency
        return now + self._latency


class _Pipe:
    """One direction."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._moved = trio.lowlevel.ParkingLot()
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._in_flight = 0
        self.ended = False
        self.broken = False
        self.refused = False

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            while self._in_flight >= ROOM_BYTES and not self.broken and not self.ended:
                await self._moved.park()
            if self.ended:
                raise trio.ClosedResourceError("this direction was finished")
            if self.broken or self.refused:
                raise trio.BrokenResourceError("the peer reset the stream")
            arrival = self._link.arrival(len(chunk), trio.current_time())
            self._chunks.append((arrival, chunk))
            self._in_flight += len(chunk)
            self.wake()
        await trio.lowlevel.checkpoint()

    async def receive(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self.broken:
            if not self._chunks:
                if self.ended:
                    return b""
                await self._moved.park()
                continue
            arrival, chunk = self._chunks[0]
            if arrival > trio.current_time():
                with trio.move_on_at(arrival):
                    await self._moved.park()
                continue
            self._chunks.popleft()
            if len(chunk) > max_bytes:
                self._chunks.appendleft((arrival, chunk[max_bytes:]))
                chunk = chunk[:max_bytes]
            self._in_flight -= len(chunk)
            self.wake()
            return chunk
        raise trio.BrokenResourceError("the peer reset the stream")

    def wake(self) -> None:
        self._moved.unpark_all()

    def finish(self) -> None:
        self.ended = True
        self.wake()

    def break_now(self) -> None:
        self.broken = True
        self._chunks.clear()
        self.wake()

    def refuse(self) -> None:
        """Nobody will read: what was sent is lost, further sends fail."""
        self.refused = True
        self._in_flight = 0
        self._chunks.clear()
        self.wake()


class MemoryStream(HalfCloseableStream):
    """One end. Made by :func:`stream_pair`."""

    def __init__(self, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False

    @override
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``; waits while too much is in flight."""
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        await self._outgoing.send(bytes(data))

    @override
    async def wait_send_all_might_not_block(self) -> None:
        """Return at once."""
        await trio.lowlevel.checkpoint()

    @override
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has arrived, or b"" when the peer finished."""
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        try:
            return await self._incoming.receive(max_bytes or CHUNK_BYTES)
        except trio.BrokenResourceError:
            if self._closed:
                raise trio.ClosedResourceError("another task closed it") from None
            raise

    @override
    async def send_eof(self) -> None:
        """Finish our direction; the peer's goes on."""
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        self._outgoing.finish()
        await trio.lowlevel.checkpoint()

    @override
    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives."""
        if not self._closed:
            self._closed = True
            self._outgoing.finish()
            self._incoming.refuse()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Break both directions at once, unless closed in order before."""
        if not self._closed:
            self._closed = True
            self._outgoing.break_now()
            self._incoming.break_now()

    def cut(self) -> None:
        """Let the connection below break: both ends find the stream reset."""
        self._outgoing.break_now()
        self._incoming.break_now()


def stream_pair(there: Link, back: Link) -> tuple[MemoryStream, MemoryStream]:
    """Return both ends of a new stream."""
    forth, reverse = _Pipe(there), _Pipe(back)
    return MemoryStream(forth, reverse), MemoryStream(reverse, forth)
