"""What the jobs service needs from the node: Protocols that ``fabric.app`` fills."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Setting
from fabric.jobs.promises import Held
from fabric.jobs.restoration import Restored
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import JobStatus


class Left(NamedTuple):
    """What is left of the lifetime of a job's slots, as shares of it; 0: not held."""

    spec: float = 0.0
    assignment: float = 0.0
    status: float = 0.0


class JobStore(Protocol):
    """Replicated specs, statuses and assignments, and this peer's own promises."""

    def specs(self) -> Mapping[JobId, bytes]:
        """Return every known spec, encoded; its key is its hash."""
        ...

    def status(self, job: JobId) -> JobStatus | None:
        """Return the status that all authorised writers amount to."""
        ...

    def settings(self, job: JobId, spec: JobSpec) -> tuple[Setting, ...]:
        """Return what authorised people set on the job's board."""
        ...

    def coordinator(self, job: JobId) -> PeerId | None:
        """Return the coordinator of the newest published assignment: a hint."""
        ...

    def left(self, job: JobId) -> Left:
        """Return for how long the slots of ``job`` still stand, whoever wrote them."""
        ...

    async def put_spec(self, job: JobId, spec: bytes) -> None:
        """Publish a spec, ours or the same bytes again."""
        ...

    async def put_status(
        self, job: JobId, status: JobStatus, *, again: bool = False
    ) -> None:
        """Publish how ``job`` stands; ``again`` also if we said the same."""
        ...

    async def put_assignment(
        self, job: JobId, counter: int, coordinator: PeerId, participants: int
    ) -> None:
        """Publish who coordinates generation ``counter`` of ``job``."""
        ...

    def promise(self, job: JobId) -> bytes | None:
        """Return what :meth:`save_promise` stored last."""
        ...

    async def save_promise(self, job: JobId, counter: int, blob: bytes) -> None:
        """Return when ``blob`` is on disk with a full sync.

        Raises:
            ResourceExhausted: the disk is full; nothing was stored.
        """
        ...

    def promised(self) -> Collection[JobId]:
        """Return the jobs about which something is stored."""
        ...

    async def close_promise(self, job: JobId) -> None:
        """Keep no more than that ``job`` is over here: :meth:`promise` is empty."""
        ...

    async def forget_promises(self, jobs: frozenset[JobId]) -> None:
        """Keep nothing of ``jobs``."""
        ...

    async def changed(self) -> None:
        """Return once something changed since the last return."""
        ...


class MemberFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What decides whether a member may take part in a job."""

    memory_bytes: int = 0
    """Free memory it announced."""
    trust: str = "member"
    """"member" or "software"."""


class Members(Protocol):
    """Who is in the mesh now, ourselves included."""

    def __call__(self) -> Mapping[PeerId, MemberFacts]:
        """Return the members that are believed to be there."""
        ...


class HotStates(Protocol):
    """States of jobs that outlive the workers which held them, here and elsewhere."""

    def newest(self, job: JobId) -> Held | None:
        """Return the newest state of ``job`` that the next worker here can have."""
        ...

    async def recall(self, job: JobId, participants: tuple[PeerId, ...]) -> Held | None:
        """Return it after a restart, perhaps got from others; bounded in time."""
        ...

    def checkpoint(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> int:
        """Return the round of the newest checkpoint of ``job``; 0: there is none."""
        ...

    async def restore(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> Restored:
        """Keep the state of the newest checkpoint of ``job``; bounded in time.

        Raises:
            FabricError: no peer in reach has it, or there is no room for it.
        """
        ...

    async def forget(self, job: JobId) -> None:
        """Keep nothing of ``job``: it is over."""
        ...


class OnCheckpoint(Protocol):
    """Takes a finished checkpoint directory."""

    async def __call__(
        self, job: JobId, spec: JobSpec, directory: Path, round: int
    ) -> str:
        """Move it into the content store, announce it, write the head; return its root.

        Raises:
            FabricError: it does not verify, or there is no room for it.
        """
        ...
