"""The one writer: batches of changes to disk, and puts that wait for their commit.

An entry of ours exists for others only after its commit: it is applied and pushed by
``on_committed``, so nothing acknowledged (or seen by a peer) can be lost with this
process. Entries of others are applied at once and reach the disk with the next batch;
if the disk refuses, they stay queued in memory (one place per slot, so bounded) and
local writes fail with the reason until it works again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import trio

from crdt_store.entry import Entry
from crdt_store.outcome import Changes
from crdt_store.replica import Replica
from crdt_store.slots import MAX_EVIDENCE
from crdt_store.storage import Storage
from fabric.core.errors import FabricError, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

_LOG = logging.getLogger(__name__)
_RETRY_SECONDS = 1.0


class Disk:
    """Runs blocking storage calls, one at a time, off the trio thread."""

    def __init__(self, storage: Storage) -> None:
        self._blocking = storage.blocking
        self._one = trio.CapacityLimiter(1)  # SQLite has one writer

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return ``call(*args)``; it completes even if we are cancelled."""
        if not self._blocking:
            await trio.lowlevel.checkpoint()
            return call(*args, **kwargs)
        return await trio.to_thread.run_sync(
            lambda: call(*args, **kwargs), limiter=self._one
        )


@dataclass(eq=False)
class _Waiting:
    entry: Entry
    done: trio.Event = field(default_factory=trio.Event)
    error: FabricError | None = None


class Committer:
    """Owns what is not on disk yet."""

    def __init__(
        self,
        replica: Replica,
        storage: Storage,
        disk: Disk,
        *,
        batch_seconds: float,
        on_committed: Callable[[Entry], None],
    ) -> None:
        self._replica = replica
        self._storage = storage
        self._disk = disk
        self._batch_seconds = batch_seconds
        self._on_committed = on_committed
        self._waiting: list[_Waiting] = []
        self._backlog = Changes()
        self._wake = trio.Event()
        self._failing = False
        self._closed = False

    def wake(self) -> None:
        """Note that the replica changed."""
        self._wake.set()

    async def commit(self, entry: Entry) -> None:
        """Return when ``entry`` is on disk and applied.

        After cancellation it may be either.

        Raises:
            FabricError: the disk refused; the entry is void.
            Unavailable: the store is closed.
        """
        if self._closed:
            raise Unavailable("the store is closed")
        waiting = _Waiting(entry)
        self._waiting.append(waiting)
        self._wake.set()
        await waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error

    async def run(self) -> None:
        """Commit batches until cancelled, then what is left."""
        try:
            while True:
                await self._wake.wait()
                await trio.sleep(self._batch_seconds)
                self._wake = trio.Event()
                # a batch taken out of memory must reach the disk or its writers
                with trio.CancelScope(shield=True):
                    await self._flush()
                if self._failing:
                    await trio.sleep(_RETRY_SECONDS)
                    self._wake.set()
        finally:
            self._closed = True
            with trio.CancelScope(shield=True):
                await self._flush()

    async def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        batch = merged(self._backlog, self._replica.take_changes())
        self._backlog = Changes()
        upserts = {**batch.upserts, **{w.entry.slot: w.entry for w in waiting}}
        if not (upserts or batch.deletes or batch.evidence):
            return
        try:
            await self._disk.run(
                self._storage.write,
                tuple(upserts.values()),
                tuple(batch.deletes),
                tuple(batch.evidence),
            )
        except FabricError as exc:
            if not self._failing:
                _LOG.error("store.write_failed code=%s reason=%s", exc.code, exc.reason)
            self._failing = True
            self._backlog = batch
            for item in waiting:
                item.error = exc
        else:
            self._failing = False
            for item in waiting:
                self._on_committed(item.entry)
        finally:
            for item in waiting:
                item.done.set()


def merged(earlier: Changes, later: Changes) -> Changes:
    """Return both changes as one, the later winning in each slot."""
    upserts = {s: e for s, e in earlier.upserts.items() if s not in later.deletes}
    deletes = {s for s in earlier.deletes if s not in later.upserts}
    return Changes(
        {**upserts, **later.upserts},
        deletes | later.deletes,
        [*earlier.evidence, *later.evidence][-MAX_EVIDENCE:],
    )
