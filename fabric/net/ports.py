"""What the network needs from above: Protocols that ``fabric/app/node.py`` fills."""

from __future__ import annotations

from typing import Protocol

import msgspec
import trio

from fabric.core.ids import PeerId


class Decision(msgspec.Struct, frozen=True):
    """An answer with its reason; a refusal says what the refused can do next."""

    allowed: bool
    code: str = ""
    reason: str = ""
    next_step: str = ""


ALLOWED = Decision(allowed=True)


class Gate(Protocol):
    """Who may open what. Default deny, synchronous, answered from memory.

    Asked by RPC, data plane and streams at open. When a decision changes, the node
    closes that peer's live connections.
    """

    def allows(self, peer: PeerId, protocol: str) -> Decision:
        """Return whether ``peer`` may open ``protocol`` (a protocol id, see below)."""
        ...


PROTOCOL_OFFER = "/fabric/data/1"
"""Control stream that offers a data-plane connection; admitted members only."""
PROTOCOL_RPC = "/fabric/rpc/1"
"""The multiplexed RPC connection; admitted members only."""
PROTOCOL_ATTEST = "/fabric/attest/1"
"""Admission. Open to everyone: this is how a peer becomes admitted."""


class Broadcast(Protocol):
    """Best-effort publish to every member of a topic (gossipsub, or memory).

    Lossy, unordered, may duplicate: whatever must arrive is repaired by reconciliation.
    """

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send ``payload`` (at most 64 KiB) to the members of ``topic``."""
        ...

    def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """Return a bounded channel of (forwarder, payload); overflow is dropped."""
        ...
