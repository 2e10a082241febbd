"""Which spare punched sockets to keep, for whom, and until when: pure.

A punch takes some round trips; a worker that needs a socket should not wait for them.
So for each peer in use a few sockets are punched ahead. They belong to the side that
asked for them, which alone may use them: otherwise both could take the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fabric.core.ids import PeerId
from nat.punch.config import PunchConfig

DOUBT_SECONDS = 3.5
"""Within this the kernel has found out which of the doubted sockets are dead."""


@dataclass
class _Shelf:
    """One peer's spares: numbers with the time they came, oldest first."""

    used_at: float
    ready: dict[int, float] = field(default_factory=dict)
    coming: int = 0
    doubted_at: float = -math.inf


class Spares:
    """Numbers stand for the sockets, which the shell holds. ``now`` is monotonic."""

    def __init__(self, config: PunchConfig) -> None:
        self._config = config
        self._shelves: dict[PeerId, _Shelf] = {}
        self._next = 0

    def __len__(self) -> int:
        return sum(len(shelf.ready) for shelf in self._shelves.values())

    def ready(self, peer: PeerId) -> int:
        """Return how many spares with ``peer`` are there."""
        shelf = self._shelves.get(peer)
        return 0 if shelf is None else len(shelf.ready)

    def used(self, peer: PeerId, now: float) -> None:
        """Note that a socket was punched for ``peer``: from now on keep spares."""
        shelf = self._shelves.setdefault(peer, _Shelf(now))
        shelf.used_at = max(shelf.used_at, now)

    def wanted(self, now: float) -> list[PeerId]:
        """Return a peer for each spare to punch now, the latest used peers first.

        The caller answers each with :meth:`started`, or leaves it for later.
        """
        room = self._config.max_spares - len(self)
        room -= sum(shelf.coming for shelf in self._shelves.values())
        found: list[PeerId] = []
        by_use = sorted(self._shelves.items(), key=lambda item: -item[1].used_at)
        for peer, shelf in by_use:
            if now - shelf.used_at >= self._config.spare_idle_seconds:
                continue
            missing = self._config.bulk_sockets - len(shelf.ready) - shelf.coming
            found += [peer] * max(0, missing)
        return found[: max(0, room)]

    def started(self, peer: PeerId) -> None:
        """Note that a spare is being punched."""
        if peer in self._shelves:
            self._shelves[peer].coming += 1

    def ended(self, peer: PeerId) -> None:
        """Note that a started punch is over, whatever it brought."""
        shelf = self._shelves.get(peer)
        if shelf is not None:
            shelf.coming = max(0, shelf.coming - 1)

    def add(self, peer: PeerId, now: float) -> int | None:
        """Return the number of a new spare, or None if there is no room for it."""
        shelf = self._shelves.get(peer)
        if (
            shelf is None
            or len(shelf.ready) >= self._config.bulk_sockets
            or len(self) >= self._config.max_spares
        ):
            return None
        self._next += 1
        shelf.ready[self._next] = now
        return self._next

    def take(self, peer: PeerId, now: float) -> int | None:
        """Return and forget the newest spare with ``peer``: its mapping is freshest.

        One that is in doubt is left until the kernel has had time to find it dead.
        """
        shelf = self._shelves.get(peer)
        if shelf is None:
            return None
        shelf.used_at = max(shelf.used_at, now)
        if not shelf.ready:
            return None
        number, since = next(reversed(shelf.ready.items()))
        if since <= shelf.doubted_at and now < shelf.doubted_at + DOUBT_SECONDS:
            return None
        del shelf.ready[number]
        return number

    def doubt(self, peer: PeerId, now: float) -> list[int]:
        """Note that the path to ``peer`` may be dead; return the spares to look at."""
        shelf = self._shelves.get(peer)
        if shelf is None:
            return []
        shelf.doubted_at = now if shelf.ready else -math.inf
        return list(shelf.ready)

    def drop(self, number: int) -> None:
        """Forget a spare that died."""
        for shelf in self._shelves.values():
            shelf.ready.pop(number, None)

    def expire(self, now: float) -> list[int]:
        """Return and forget the spares idle for too long; the shell closes them."""
        limit = self._config.spare_idle_seconds
        gone: list[int] = []
        for peer, shelf in list(self._shelves.items()):
            old = [n for n, since in shelf.ready.items() if now - since >= limit]
            for number in old:
                del shelf.ready[number]
            gone += old
            idle = now - shelf.used_at >= limit
            if idle and not shelf.ready and not shelf.coming:
                del self._shelves[peer]
        return gone

    def forget(self, peer: PeerId) -> list[int]:
        """Return and forget all spares with ``peer``; the shell closes them."""
        shelf = self._shelves.pop(peer, None)
        return [] if shelf is None else list(shelf.ready)

    def clear(self) -> list[int]:
        """Return and forget every spare: the network changed under them."""
        return [n for peer in list(self._shelves) for n in self.forget(peer)]
