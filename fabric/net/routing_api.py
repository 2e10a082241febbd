"""Content routing: who holds what (``libp2p_kad.py``, ``memory_host.py``)."""

from __future__ import annotations

from typing import Protocol

from fabric.core.ids import PeerId


class ContentRouting(Protocol):
    """Provider records. Roots only, never chunks; hints, never truth."""

    async def provide(self, key: bytes) -> int:
        """Announce that we hold ``key`` (32 bytes); return how many peers stored it."""
        ...

    async def find_providers(self, key: bytes, limit: int) -> tuple[PeerId, ...]:
        """Return up to ``limit`` distinct peers said to hold ``key``, asked afresh."""
        ...
