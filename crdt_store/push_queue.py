"""Entries on their way to gossip: batched, paced and bounded; no I/O, no clock.

What is written within 50 ms leaves in one message, and no more than five messages leave
per second, because py-libp2p drops what exceeds ten per second on a link and topic. One
entry per slot waits: a later one takes its place. What does not fit is dropped and
counted by the caller; reconciliation brings it.
"""

from __future__ import annotations

from crdt_store.config import StoreConfig
from crdt_store.entry import Entry, Slot
from crdt_store.messages import MAX_CARRIED, MAX_PUSH_BYTES, PUSH, Push

_HEADER_BYTES = 8
"""msgpack header of one entry in a push, rounded up."""


class PushQueue:
    """Our entries that gossip has not carried yet.

    Attributes:
        next_at: Monotonic seconds at which a message may leave, None with nothing
            to send.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._batch_seconds = config.push_batch_seconds
        self._interval_seconds = config.push_interval_seconds
        self._max_backlog = config.max_push_backlog
        self._backlog: dict[Slot, bytes] = {}
        self._free_at = float("-inf")
        self.next_at: float | None = None

    def __len__(self) -> int:
        return len(self._backlog)

    def add(self, entry: Entry, now: float) -> bool:
        """Queue ``entry``; return False when there was no room for it."""
        full = len(self._backlog) >= self._max_backlog
        if full and entry.slot not in self._backlog:
            return False
        # to the end: a slot that is rewritten all the time must not overtake others
        self._backlog.pop(entry.slot, None)
        self._backlog[entry.slot] = entry.raw
        if self.next_at is None:
            self.next_at = max(now + self._batch_seconds, self._free_at)
        return True

    def take(self, now: float) -> bytes | None:
        """Return the message to publish now, or None before :attr:`next_at`."""
        if self.next_at is None or now < self.next_at:
            return None
        batch: list[bytes] = []
        room = MAX_PUSH_BYTES
        for slot, raw in list(self._backlog.items())[:MAX_CARRIED]:
            room -= len(raw) + _HEADER_BYTES
            if room < 0:
                break
            batch.append(raw)
            del self._backlog[slot]
        self._free_at = now + self._interval_seconds
        self.next_at = self._free_at if self._backlog else None
        return PUSH.encode(Push(tuple(batch)))
