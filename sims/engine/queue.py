"""The event queue: what happens next, and when, in virtual seconds.

Events at the same instant happen in the order in which they were planned, so a run is a
function of its seed alone. An event is a function with its arguments, not a closure:
an hour of a thousand peers is some ten million of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[..., None]
_Event = tuple[float, int, Action, tuple[object, ...]]


class Engine:
    """Virtual time.

    Attributes:
        now: Seconds since the run began.
        num_events: Events that have happened.
    """

    __slots__ = ("_heap", "_serial", "now", "num_events")

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._serial = 0
        self._heap: list[_Event] = []

    def at(self, when: float, action: Action, *args: object) -> None:
        """Call ``action(*args)`` at ``when``, at once if that has passed."""
        self._serial += 1
        heapq.heappush(self._heap, (max(when, self.now), self._serial, action, args))

    def after(self, delay: float, action: Action, *args: object) -> None:
        """Call ``action(*args)`` in ``delay`` seconds."""
        self._serial += 1
        heapq.heappush(self._heap, (self.now + delay, self._serial, action, args))

    def run(self, until: float) -> None:
        """Let everything happen that is planned up to ``until``, and move there."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, action, args = pop(heap)
            self.num_events += 1
            action(*args)
        self.now = until
