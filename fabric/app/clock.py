"""Compare clocks over RPC: a peer's Unix time, less ours half-way through the call."""

from __future__ import annotations

import math
import struct
import time

import trio

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId
from fabric.net.rpc_api import Rpc
from nat.doctor.facts import ClockSample

CLOCK = "node.clock"
"""RPC method that answers with Unix seconds, one big-endian double."""
_SECONDS = struct.Struct(">d")


def serve_clock(rpc: Rpc) -> None:
    """Answer members that ask for our time."""
    rpc.register(CLOCK, lambda peer, request: _SECONDS.pack(time.time()))


async def compare_clock(rpc: Rpc, peer: PeerId, name: str) -> ClockSample:
    """Return how far ``peer``'s clock is from ours.

    Raises:
        FabricError: it cannot be asked, or answers nonsense.
    """
    started, wall = trio.current_time(), time.time()
    answer = await rpc.call(peer, CLOCK, b"")
    half = (trio.current_time() - started) / 2
    return ClockSample(name, read_clock_untrusted(answer) - (wall + half), half)


def read_clock_untrusted(answer: bytes) -> float:
    """Return the Unix seconds in ``answer``.

    Raises:
        RemoteProtocolError: it is not a time.
    """
    if len(answer) != _SECONDS.size:
        raise RemoteProtocolError(f"clock answer of {len(answer)} B")
    seconds: float = _SECONDS.unpack(answer)[0]
    if not math.isfinite(seconds) or not 0 <= seconds < 2**40:
        raise RemoteProtocolError("clock answer is not a time")
    return seconds
