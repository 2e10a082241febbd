"""A :class:`Storage` in memory, for virtual time and simulations."""

from __future__ import annotations

from collections.abc import Sequence

from crdt_store.entry import Entry, Slot
from crdt_store.storage import Promise, check_promise
from fabric.core.digest import digest


class MemoryStorage:
    """Survives its store, not its process."""

    blocking = False

    def __init__(self) -> None:
        self._entries: dict[Slot, bytes] = {}
        self._promises: dict[str, Promise] = {}
        self._mark = 0

    def load(self) -> list[bytes]:
        """Return every stored entry."""
        return list(self._entries.values())

    def write(
        self,
        upserts: Sequence[Entry],
        deletes: Sequence[Slot],
        evidence: Sequence[tuple[Entry, Entry]] = (),
    ) -> None:
        """Keep entries, forget deleted slots; evidence is not kept."""
        for slot in deletes:
            self._entries.pop(slot, None)
        for entry in upserts:
            self._entries[entry.slot] = entry.raw

    def high_water(self) -> int:
        """Return the clock's mark."""
        return self._mark

    def save_high_water(self, mark: int) -> None:
        """Keep a mark of at least ``mark``."""
        self._mark = max(self._mark, mark)

    def save_promise(self, job: str, counter: int, blob: bytes) -> None:
        """Keep the promise; see :class:`Storage`."""
        held = self._promises.get(job)
        check_promise(job, counter, held.counter if held else None)
        self._promises[job] = Promise(counter, digest(blob), blob)

    def forget_promises(self, jobs: frozenset[str]) -> None:
        """Hold nothing of ``jobs``."""
        for job in jobs:
            self._promises.pop(job, None)

    def load_promises(self) -> dict[str, Promise]:
        """Return the promises by job."""
        return dict(self._promises)

    def close(self) -> None:
        """Do nothing: a later store may open what this one kept."""
