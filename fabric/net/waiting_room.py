"""Places for connections that have not said yet who they are.

Whoever is honest speaks at once, so when all places are taken the one who waited
longest leaves, of the address that holds most: thousands of connections that say
nothing cost a bounded number of places, and keep nobody out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from fabric.core.errors import ResourceExhausted


class WaitingRoom:
    """Bounded places, each held by a task.

    Args:
        size: How many.

    Attributes:
        evicted: How many had to leave for others.
    """

    def __init__(self, size: int) -> None:
        self._size = max(1, size)
        self._places: dict[trio.lowlevel.Task, tuple[str, trio.CancelScope]] = {}
        self._count: Counter[str] = Counter()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def place(self, source: str) -> Iterator[None]:
        """Hold a place in this task; who must leave is cancelled.

        Args:
            source: Whom it counts for: an IP address.

        Raises:
            ResourceExhausted: the place was needed for another.
        """
        if len(self._places) >= self._size:
            self._evict()
        task, scope = trio.lowlevel.current_task(), trio.CancelScope()
        self._places[task] = (source, scope)
        self._count[source] += 1
        try:
            with scope:
                yield
        finally:
            self._leave(task)
        if scope.cancelled_caught:
            raise ResourceExhausted(
                f"{self._size} connections wait to authenticate", code="E_BUSY"
            )

    def settle(self) -> None:
        """Give up this task's place, if it has one: it can no longer be cancelled."""
        self._leave(trio.lowlevel.current_task())

    def _evict(self) -> None:
        most = max(self._count.values())
        for task, (source, scope) in self._places.items():  # oldest first
            if self._count[source] == most:
                scope.cancel()
                self._leave(task)
                self.evicted += 1
                return

    def _leave(self, task: trio.lowlevel.Task) -> None:
        held = self._places.pop(task, None)
        if held is not None:
            self._count[held[0]] -= 1
            if not self._count[held[0]]:
                del self._count[held[0]]
