"""RPC as its users see it; ``rpc.py`` is the implementation.

Both may be called by either side of the one connection that a pair of peers has. A
request carries its remaining time, taken from the caller's cancel scope.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from fabric.core.ids import PeerId

Handler = Callable[[PeerId, bytes], bytes]
"""Answers inline in the reader: must not block, must return within a millisecond."""
AsyncHandler = Callable[[PeerId, bytes], Awaitable[bytes]]
"""Gets a task of its own, bounded in number per connection."""

MAX_RPC_BYTES = 4 << 20
"""Largest request or response. Anything that can be larger rides a bulk connection."""


class Rpc(Protocol):
    """Calls to peers and handlers for their calls."""

    def register(self, method: str, handler: Handler) -> None:
        """Answer ``method`` ("package.verb") inline."""
        ...

    def register_async(self, method: str, handler: AsyncHandler) -> None:
        """Answer ``method`` in a task of its own."""
        ...

    async def call(self, peer: PeerId, method: str, request: bytes) -> bytes:
        """Return the peer's response; connects first if there is no connection.

        Bound it with ``trio.fail_after`` at the call site; without a deadline the
        default of the configuration (10 s) holds.

        Raises:
            Unavailable: the peer cannot be reached, left, or was slow (PeerTimeout).
            RemoteRefused: the peer declined, with its code, reason and next step.
        """
        ...

    def connected(self) -> frozenset[PeerId]:
        """Return the peers with a live RPC connection."""
        ...

    def lost(self) -> trio.MemoryReceiveChannel[PeerId]:
        """Return a new bounded channel of peers whose RPC connection just broke."""
        ...

    def rtt_seconds(self, peer: PeerId) -> float | None:
        """Return the smoothed round-trip time, or None when unknown."""
        ...
