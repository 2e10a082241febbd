"""One worker's part in keeping states in memory: which one is written next."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from typing import Protocol

from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Generation, StateHeld
from fabric.jobs.spec import JobSpec
from training.hot_store import HotState
from training.messages import LoadHot, WriteHot

Tell = Callable[[WriteHot | LoadHot, io.FileIO], Awaitable[None]]
"""Sends a command with its file to the worker; owns the file from then on."""


class HotKeeping(Protocol):
    """What keeps the states: ``training.hot_service.HotService``."""

    async def begin(self, state: HotState, spec: JobSpec) -> io.FileIO | None:
        """Return a file to write ``state`` into."""
        ...

    async def finish(
        self, state: HotState, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> bool:
        """Keep what was written."""
        ...

    def abort(self, state: HotState) -> None:
        """It was not written."""
        ...

    def open(self, job: JobId, digest: str) -> tuple[HotState, io.FileIO] | None:
        """Return a kept state."""
        ...

    def damaged(self, digest: str) -> None:
        """A kept state is not what it should be."""
        ...


class HotKeeper:
    """Has the states of one worker written, one at a time, the newest next.

    Args:
        hot: Keeps them.
        job: The job.
        spec: Its spec.
        tell: Sends commands to the worker.
    """

    def __init__(self, hot: HotKeeping, job: JobId, spec: JobSpec, tell: Tell) -> None:
        self._hot, self._job, self._spec, self._tell = hot, job, spec, tell
        self._every = spec.checkpoint.hot_every_rounds
        self._participants: tuple[PeerId, ...] = ()
        self._in_worker: set[str] = set()
        self._newest = ""
        self._writing: HotState | None = None
        self._next: HotState | None = None

    async def enter(self, generation: Generation) -> None:
        """Give the worker the state that ``generation`` starts from, if it is kept."""
        self._participants = generation.participants
        digest = generation.state_digest
        if not digest or digest in self._in_worker:
            return
        found = self._hot.open(self._job, digest)
        if found is not None:
            state, file = found
            await self._tell(LoadHot(state.round, state.digest), file)

    async def held(self, held: StateHeld) -> None:
        """The worker holds a state."""
        if not held.state_digest or held.state_digest == self._newest:
            return
        self._newest = held.state_digest
        self._in_worker = {self._newest}
        if self._every and held.round % self._every == 0:
            self._next = HotState(self._job, held.round, held.state_digest)
            await self._begin()

    async def written(self, digest: str) -> int | None:
        """The worker wrote a state; return its round if it is kept now."""
        state, self._writing = self._writing, None
        kept = False
        if state is not None and state.digest == digest:
            kept = await self._hot.finish(state, self._spec, self._participants)
        await self._begin()
        return state.round if state is not None and kept else None

    async def failed(self, digest: str) -> None:
        """The worker could not write a state, or not use the one it was given."""
        state = self._writing
        if state is not None and state.digest == digest:
            self._writing = None
            self._hot.abort(state)
            await self._begin()
        else:
            self._hot.damaged(digest)

    def close(self) -> None:
        """The worker is gone."""
        if self._writing is not None:
            self._hot.abort(self._writing)
            self._writing = None

    async def _begin(self) -> None:
        if self._writing is not None or self._next is None:
            return
        state, self._next = self._next, None
        if (kept := self._hot.open(self._job, state.digest)) is not None:
            kept[1].close()
            return
        self._writing = state
        file = await self._hot.begin(state, self._spec)
        if file is None:
            self._writing = None
            return
        await self._tell(WriteHot(state.digest), file)
