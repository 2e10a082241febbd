"""Watches: "something in this table changed since you last looked"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from weakref import WeakSet

import trio


class Watch:
    """Wakes its one reader after changes of a table.

    Coalescing and so bounded: any number of changes between two looks wake once. Read
    the view after creating the watch, then again after each wake-up. A watch that
    nobody refers to any more vanishes.
    """

    def __init__(self) -> None:
        self._changed = trio.Event()

    def notify(self) -> None:
        """Note a change."""
        self._changed.set()

    async def changed(self) -> None:
        """Return once the table changed after the last return (or creation)."""
        await self._changed.wait()
        self._changed = trio.Event()

    async def __aiter__(self) -> AsyncIterator[None]:
        """Yield after each (coalesced) change, for ever."""
        while True:
            await self.changed()
            yield


class Watchers:
    """All watches, by table."""

    def __init__(self) -> None:
        self._by_table: defaultdict[str, WeakSet[Watch]] = defaultdict(WeakSet)

    def watch(self, *tables: str) -> Watch:
        """Return a new watch of ``tables``."""
        watch = Watch()
        for table in tables:
            self._by_table[table].add(watch)
        return watch

    def touched(self, tables: Iterable[str]) -> None:
        """Wake the watches of ``tables``."""
        for table in tables:
            if table in self._by_table:
                for watch in self._by_table[table]:
                    watch.notify()
