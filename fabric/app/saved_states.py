"""Finds the checkpoints of a running job by their heads, and brings one here."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from checkpoints.directories import disk_errors
from crdt_store.views import CheckpointHead, Heads
from fabric.app.checkpoint_flow import RUN_CHARS, CheckpointFlow
from fabric.core.errors import FabricError, PeerTimeout, Unavailable
from fabric.core.ids import JobId, PeerId
from fabric.jobs.spec import JobSpec
from training.saved_states import SavedState

MAX_TRIED = 4
"""Checkpoints tried before a job waits: the newest, then older ones."""


class HeadStates:
    """Checkpoints of jobs: implements :class:`training.saved_states.SavedStates`.

    A head is signed, but any member may publish one: those of the job's own peers are
    believed before those of others, who may have left the job since.

    Args:
        own: This peer.
        heads: Which checkpoints there are.
        flow: Brings one.
        folder: Where it is laid out meanwhile.
    """

    def __init__(
        self, own: PeerId, heads: Heads, flow: CheckpointFlow, folder: Path
    ) -> None:
        self._own, self._heads, self._flow = own, heads, flow
        self._folder = folder

    def rounds(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> Collection[int]:
        """Return the rounds of which there are checkpoints of ``job``."""
        return [head.round for head in self._found(job, spec, participants)]

    def _found(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> list[CheckpointHead]:
        """Return the heads that may say where ``job`` was, the newest first."""
        run, rounds = job[:RUN_CHARS], spec.train.outer.rounds
        known = {self._own, PeerId(spec.submitter), *participants}
        by_step = self._heads.all(run, known) or self._heads.all(run)
        return [
            head
            for step, head in sorted(by_step.items(), reverse=True)
            if spec.resume_round < head.round == step <= rounds
        ]

    @asynccontextmanager
    async def opened(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> AsyncIterator[SavedState]:
        """Have the newest checkpoint that can be had here while inside.

        Raises:
            FabricError: none can be had; the reason is the newest one's.
        """
        heads = self._found(job, spec, participants)[:MAX_TRIED]
        failure: FabricError = Unavailable("the job has no checkpoint")
        target = self._folder / f"state-{job}"
        try:
            for head in heads:
                try:
                    await self._obtain(spec, head, target)
                except FabricError as exc:
                    failure = failure if head is not heads[0] else exc
                else:
                    yield SavedState(target, head.round, head.root)
                    return
            raise failure
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutil.rmtree, target, True)

    async def _obtain(self, spec: JobSpec, head: CheckpointHead, target: Path) -> None:
        try:
            with disk_errors(target):
                await trio.to_thread.run_sync(shutil.rmtree, target, True)
                self._folder.mkdir(parents=True, exist_ok=True)
                await self._flow.obtain_state(spec, head.root, head.round, target)
        except trio.TooSlowError:
            raise PeerTimeout(f"checkpoint {head.root[:12]} did not arrive") from None
