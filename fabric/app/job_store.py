"""The jobs service's store, filled from the replicated store's tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Annotated

import msgspec
import trio

from crdt_store.job_views import JOB_TTL_SECONDS
from crdt_store.job_views import JobStatus as StatusSlot
from crdt_store.service import Store
from crdt_store.views import Watch
from fabric.app.boards import board_of
from fabric.core.codec import Codec
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Setting
from fabric.jobs.ports import Left
from fabric.jobs.retirement_service import CLOSED
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import STATUS, JobStatus


class AssignmentHint(msgspec.Struct, frozen=True):
    """What an assignment slot says; whoever acts on it checks the epoch itself."""

    coordinator: Annotated[PeerId, msgspec.Meta(max_length=64)]
    participants: int


_HINT: Codec[AssignmentHint] = Codec(AssignmentHint, max_bytes=256)


class ReplicatedJobStore:
    """Implements :class:`fabric.jobs.ports.JobStore`.

    Args:
        store: The tables.
        clock: Wall seconds, as the store's.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
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
        """Return the coordinator of the newest published assignment: a hint.

        None if it is not there: whoever follows it will say so.
        """
        assignment = self._store.assignments.get(job)
        if assignment is None:
            return None
        try:
            hint = _HINT.decode_untrusted(assignment.generation).coordinator
        except RemoteProtocolError:
            return None
        return None if self._store.presence.absence(hint) else hint

    def settings(self, job: JobId, spec: JobSpec) -> tuple[Setting, ...]:
        """Return what authorised people set on the job's board."""
        return board_of(self._store, job, spec).settings

    def left(self, job: JobId) -> Left:
        """Return for how long the slots of ``job`` still stand, whoever wrote them."""
        held = (
            self._store.jobs.spec_until(job),
            self._store.assignments.held_until(job),
            self._store.jobs.status_until(job),
        )
        now = self._clock()
        return Left(*(max(0.0, until - now) / JOB_TTL_SECONDS for until in held))

    async def put_spec(self, job: JobId, spec: bytes) -> None:
        """Publish a spec, ours or the same bytes again."""
        await self._store.jobs.put_spec(job, spec)

    async def put_status(
        self, job: JobId, status: JobStatus, *, again: bool = False
    ) -> None:
        """Publish how ``job`` stands; ``again`` also if we said the same."""
        slot = StatusSlot(
            state=status.state.value,
            counter=status.counter,
            coordinator=status.coordinator or "",
            detail=STATUS.encode(status),
        )
        await self._store.jobs.put_status(job, slot, again=again)

    async def put_assignment(
        self, job: JobId, counter: int, coordinator: PeerId, participants: int
    ) -> None:
        """Publish who coordinates generation ``counter`` of ``job``."""
        hint = _HINT.encode(AssignmentHint(coordinator, participants))
        await self._store.assignments.put(job, counter, hint)

    def promise(self, job: JobId) -> bytes | None:
        """Return what :meth:`save_promise` stored last."""
        promise = self._store.promises.get(job)
        return None if promise is None else promise.blob

    async def save_promise(self, job: JobId, counter: int, blob: bytes) -> None:
        """Return when ``blob`` is on disk with a full sync."""
        await self._store.promises.save(job, counter, blob)

    def promised(self) -> Collection[JobId]:
        """Return the jobs about which something is stored."""
        return [JobId(job) for job in self._store.promises.all()]

    async def close_promise(self, job: JobId) -> None:
        """Keep no more than that ``job`` is over here."""
        held = self._store.promises.get(job)
        if held is not None:
            await self._store.promises.save(job, held.counter, CLOSED)

    async def forget_promises(self, jobs: frozenset[JobId]) -> None:
        """Keep nothing of ``jobs``."""
        await self._store.promises.forget(jobs)

    async def changed(self) -> None:
        """Return once a job, an assignment or a board changed since the last return."""
        async with trio.open_nursery() as nursery:

            async def follow(watch: Watch) -> None:
                await watch.changed()
                nursery.cancel_scope.cancel()

            for watch in (self._jobs, self._assignments, self._documents):
                nursery.start_soon(follow, watch)
