"""The pump that joins two streams: what a relay does with a circuit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import trio

PIECE_BYTES = 64 * 1024
"""What the pump holds of one direction."""


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
