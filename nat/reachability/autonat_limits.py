"""How many requests of strangers are served: per peer, per address and in all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

WINDOW_SECONDS = 60.0
MAX_KEYS = 1024
"""Askers that are counted one by one; beyond, the limit of all holds anyway."""


class RequestLimits:
    """Sliding windows of one minute. Pure: time is passed in.

    Args:
        per_key: Requests of one key (a peer, an address) per minute.
        total: Requests in all per minute; also bounds the memory.
    """

    def __init__(self, per_key: int, total: int) -> None:
        self._per_key = per_key
        self._total = total
        self._times: deque[tuple[float, tuple[str, ...]]] = deque()
        self._counts: dict[str, int] = {}

    def admit(self, keys: Iterable[str], now: float) -> bool:
        """Return whether one more request by ``keys`` is served; count it then.

        What is refused is not counted: an asker that goes on is served again as soon
        as its window has room.
        """
        self._expire(now)
        wanted = tuple(dict.fromkeys(keys))
        if len(self._times) >= self._total:
            return False
        if any(self._counts.get(key, 0) >= self._per_key for key in wanted):
            return False
        new = sum(key not in self._counts for key in wanted)
        if len(self._counts) + new > MAX_KEYS:
            return False
        self._times.append((now, wanted))
        for key in wanted:
            self._counts[key] = self._counts.get(key, 0) + 1
        return True

    def _expire(self, now: float) -> None:
        while self._times and now - self._times[0][0] >= WINDOW_SECONDS:
            _, keys = self._times.popleft()
            for key in keys:
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]
