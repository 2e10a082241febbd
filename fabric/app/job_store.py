"""The jobs service's store, filled from the replicated store's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import trio

from crdt_store.job_views import JobStatus as StatusSlot
from crdt_store.service import Store
from crdt_store.views import Watch
from fabric.app.boards import board_of
from fabric.core.codec import Codec
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Setting
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import STATUS, JobStatus


class AssignmentHint(msgspec.Struct, frozen=True):
    """What an assignment slot says; whoever acts on it checks the epoch itself."""

    coordinator: Annotated[PeerId, msgspec.Meta(max_length=64)]
    participants: int


_HINT: Codec[AssignmentHint] = Codec(AssignmentHint, max_bytes=256)


class ReplicatedJobStore:
    """Implements :class:`fabric.jobs.ports.JobStore`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs = store.jobs.watch()
        self._assignments = store.assignments.watch()
        self._documents = store.documents.watch()

    def specs(self) -> Mapping[JobId, bytes]:
        """Return every known spec, encoded."""
        rows = self._store.jobs.all()
        return {job: row.spec for job, row in rows.items() if row.spec is not None}

    def status(self, job: JobId) -> JobStatus | None:
        """Return the status that all authorised writers amount to."""
        slot = self._store.jobs.status(job)
        if slot is None:
            return None
        try:
            return STATUS.decode_untrusted(slot.detail)
        except RemoteProtocolError:
            return None

    def coordinator(self, job: JobId) -> PeerId | None:
        """Return the coordinator of the newest published assignment: a hint."""
        assignment = self._store.assignments.get(job)
        if assignment is None:
            return None
        try:
            return _HINT.decode_untrusted(assignment.generation).coordinator
        except RemoteProtocolError:
            return None

    def settings(self, job: JobId, spec: JobSpec) -> tuple[Setting, ...]:
        """Return what authorised people set on the job's board."""
        return board_of(self._store, job, spec).settings

    async def put_spec(self, job: JobId, spec: bytes) -> None:
        """Publish a spec."""
        await self._store.jobs.put_spec(job, spec)

    async def put_status(self, job: JobId, status: JobStatus) -> None:
        """Publish how ``job`` stands."""
        slot = StatusSlot(
            state=status.state.value,
            counter=status.counter,
            coordinator=status.coordinator or "",
            detail=STATUS.encode(status),
        )
        await self._store.jobs.put_status(job, slot)

    async def put_assignment(
        self, job: JobId, counter: int, coordinator: PeerId, participants: int
    ) -> None:
        """Publish who coordinates generation ``counter`` of ``job``."""
        hint = _HINT.encode(AssignmentHint(coordinator, participants))
        await self._store.assignments.put(job, counter, hint)

    def promise(self, job: JobId) -> bytes | None:
        """Return what :meth:`save_promise` stored last."""
        promise = self._store.load_promises().get(job)
        return None if promise is None else promise.blob

    async def save_promise(self, job: JobId, counter: int, blob: bytes) -> None:
        """Return when ``blob`` is on disk with a full sync."""
        await self._store.save_promise(job, counter, blob)

    async def changed(self) -> None:
        """Return once a job, an assignment or a board changed since the last return."""
        async with trio.open_nursery() as nursery:

            async def follow(watch: Watch) -> None:
                await watch.changed()
                nursery.cancel_scope.cancel()

            for watch in (self._jobs, self._assignments, self._documents):
                nursery.start_soon(follow, watch)
