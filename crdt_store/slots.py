"""The fold: one winner per slot, by (hlc, id); lifetimes; equivocation.

A join semilattice: a slot's state is the maximum of the entries offered to it, so
order, repetition and grouping of deliveries do not matter.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator
from enum import Enum

from crdt_store.entry import Entry, Slot

MAX_EVIDENCE = 256
"""Pairs of conflicting entries kept; the oldest go."""


class Standing(Enum):
    """How an entry compares with what its slot holds."""

    NEWER = "newer"
    SAME = "same"
    OLDER = "older"
    CONFLICT = "conflict"
    """Same slot and clock, other bytes: the author signed two histories."""


class Slots:
    """Winners by slot, with an index by key."""

    def __init__(self) -> None:
        self._held: dict[Slot, Entry] = {}
        self._tables: dict[str, dict[str, tuple[Entry, ...]]] = {}
        self._authored: dict[bytes, set[Slot]] = defaultdict(set)
        self._deadlines: list[tuple[float, bytes, Slot]] = []  # next one per entry
        self._evidence: dict[Slot, tuple[Entry, Entry]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._held.values())

    def get(self, slot: Slot) -> Entry | None:
        """Return the winner of ``slot``."""
        return self._held.get(slot)

    def authored(self, author: bytes) -> list[Entry]:
        """Return the winners written by ``author``."""
        return [self._held[slot] for slot in self._authored.get(author, ())]

    def num_authored(self, author: bytes) -> int:
        """Return how many slots ``author`` fills."""
        return len(self._authored.get(author, ()))

    def at(self, key: str) -> list[Entry]:
        """Return the winners of all authors at ``key``."""
        table = self._tables.get(key.split("/", 1)[0], {})
        return list(table.get(key, ()))

    def under(self, prefix: str) -> list[Entry]:
        """Return the winners whose key starts with ``prefix`` ("j/", "c/run/")."""
        table = self._tables.get(prefix.split("/", 1)[0], {})
        return [
            entry
            for key, by_authors in table.items()
            if key.startswith(prefix)
            for entry in by_authors
        ]

    def standing(self, entry: Entry) -> Standing:
        """Return how ``entry`` compares with its slot."""
        held = self._held.get(entry.slot)
        if held is None:
            return Standing.NEWER
        if held.id == entry.id:
            return Standing.SAME
        if held.hlc == entry.hlc:
            return Standing.CONFLICT
        return Standing.NEWER if entry.hlc > held.hlc else Standing.OLDER

    def put(self, entry: Entry) -> Entry | None:
        """Make ``entry`` the winner of its slot; return the one it replaces."""
        before = self._held.get(entry.slot)
        self._held[entry.slot] = entry
        table = self._tables.setdefault(entry.key.split("/", 1)[0], {})
        table[entry.key] = (*_others(table, entry), entry)
        self._authored[entry.author].add(entry.slot)
        if entry.ttl_seconds:
            self._push(entry.fades_at, entry)
        return before

    def drop(self, slot: Slot) -> Entry:
        """Empty ``slot`` and return what it held."""
        entry = self._held.pop(slot)
        table = self._tables[entry.key.split("/", 1)[0]]
        others = _others(table, entry)
        if others:
            table[entry.key] = others
        else:
            del table[entry.key]
        self._authored[entry.author].discard(slot)
        if not self._authored[entry.author]:
            del self._authored[entry.author]
        return entry

    def _push(self, when: float, entry: Entry) -> None:
        if len(self._deadlines) > 2 * len(self._held) + 1000:  # mostly overwritten
            self._deadlines = [d for d in self._deadlines if self._current(d)]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (when, entry.id, entry.slot))

    def _current(self, deadline: tuple[float, bytes, Slot]) -> Entry | None:
        _, entry_id, slot = deadline
        held = self._held.get(slot)
        return held if held is not None and held.id == entry_id else None

    def next_due(self) -> float:
        """Return the wall seconds before which :meth:`due` yields nothing."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def due(self, now: float) -> Iterator[tuple[Entry, bool]]:
        """Yield each current entry that fades (False) or expires (True) by ``now``."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline = heapq.heappop(self._deadlines)
            entry = self._current(deadline)
            if entry is None:
                continue
            final = deadline[0] >= entry.expires_at
            if not final:
                self._push(entry.expires_at, entry)
            yield entry, final

    def keep_evidence(self, one: Entry, other: Entry) -> bool:
        """Remember that an author signed both entries for one slot and clock.

        Returns:
            Whether it is news: the pair of one slot is enough.
        """
        known = self._evidence.get(one.slot)
        if known is not None and known[0].hlc == one.hlc:
            return False
        while len(self._evidence) >= MAX_EVIDENCE:
            self._evidence.pop(next(iter(self._evidence)))
        self._evidence[one.slot] = (one, other)
        return True

    def evidence(self) -> list[tuple[Entry, Entry]]:
        """Return the conflicting pairs kept, oldest first."""
        return list(self._evidence.values())


def _others(table: dict[str, tuple[Entry, ...]], entry: Entry) -> tuple[Entry, ...]:
    held = table.get(entry.key, ())
    return tuple(other for other in held if other.author != entry.author)
