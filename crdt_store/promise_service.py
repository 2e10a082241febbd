"""What this peer promised about jobs: on disk with a full sync, in memory for reading.

A promise is kept for as long as its job may act on it, and forgotten when the job is
over: peers take part in thousands of jobs.
"""

from __future__ import annotations

from crdt_store.commit_service import Disk
from crdt_store.storage import Promise, Storage
from fabric.core.digest import digest


class Promises:
    """The promises of one peer.

    Args:
        storage: Keeps them.
        disk: Runs the storage's calls.
    """

    def __init__(self, storage: Storage, disk: Disk) -> None:
        self._storage = storage
        self._disk = disk
        self._held = storage.load_promises()

    def all(self) -> dict[str, Promise]:
        """Return the promises on disk, by job."""
        return dict(self._held)

    def get(self, job: str) -> Promise | None:
        """Return what was promised for ``job``."""
        return self._held.get(job)

    async def save(self, job: str, counter: int, blob: bytes) -> None:
        """Return when the promise is on disk with a full sync.

        Raises:
            LocalProtocolError: a higher counter is promised for ``job``.
            ResourceExhausted: the disk is full; nothing was promised.
        """
        await self._disk.run(self._storage.save_promise, job, counter, blob)
        self._held[job] = Promise(counter, digest(blob), blob)

    async def forget(self, jobs: frozenset[str]) -> None:
        """Return when nothing is held of ``jobs``, which must be over for good.

        Raises:
            ResourceExhausted: the disk is full; nothing was forgotten.
        """
        await self._disk.run(self._storage.forget_promises, jobs)
        for job in jobs:
            self._held.pop(job, None)
