"""One job's runner on this peer: opened on demand, fed in order, failures contained."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from fabric.core.errors import FabricError, ResourceExhausted, Unavailable
from fabric.core.ids import JobId, PeerId, short
from fabric.jobs.messages import Generation, RoundDecision
from fabric.jobs.runner import (
    CHECKPOINT_FACT,
    CHECKPOINT_FAILED_FACT,
    Runner,
    RunnerEvent,
    RunnerFactory,
    RunnerFailed,
    RunnerProgress,
)
from fabric.jobs.spec import JobSpec

logger = logging.getLogger(__name__)


class SaveTo(NamedTuple):
    """Write the state of ``round`` under ``directory``."""

    directory: Path
    round: int


Command = Generation | RoundDecision | SaveTo
"""Apply it, decide it, or save to it."""


class Context(msgspec.Struct, frozen=True):
    """The :class:`~fabric.jobs.runner.RunnerContext` of one job."""

    job: JobId
    spec: JobSpec
    peer_id: PeerId
    scratch: Path


class RunnerHost:
    """Own at most one runner of a job at a time.

    Args:
        factory: Opens a runner.
        context: Handed to it.
        emit: Takes each event of the runner; bounded by its receiver.
    """

    def __init__(
        self,
        factory: RunnerFactory,
        context: Context,
        emit: Callable[[RunnerEvent], Awaitable[None]],
    ) -> None:
        self._factory, self._context, self._emit = factory, context, emit
        self._scope: trio.CancelScope | None = None
        self._commands: trio.MemorySendChannel[Command] | None = None
        self._saved: trio.Event | None = None
        self._save_error = ""
        self._turn = trio.Lock()  # one worker after the other in one scratch directory

    @property
    def running(self) -> bool:
        """Whether a runner is open."""
        return self._commands is not None

    def send(self, command: Command, nursery: trio.Nursery) -> None:
        """Queue ``command``; a generation opens a runner in ``nursery`` if need be.

        Without a runner anything else is dropped: the next generation makes it good.

        Raises:
            ResourceExhausted: the runner does not take commands; it is closed.
        """
        if self._commands is None:
            if not isinstance(command, Generation):
                return
            # 64: a handful of commands per round, and a runner is never rounds behind
            self._commands, receive = trio.open_memory_channel[Command](64)
            self._scope = trio.CancelScope()
            nursery.start_soon(self._run, receive, self._scope)
        try:
            self._commands.send_nowait(command)
        except (trio.WouldBlock, trio.BrokenResourceError) as exc:
            self.close()
            raise ResourceExhausted("the runner does not take commands") from exc

    def close(self) -> None:
        """End the runner, if any; its worker is gone when the task has ended."""
        self._commands = None
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None

    async def save(self, order: SaveTo, nursery: trio.Nursery) -> None:
        """Return when the runner has written the state; one at a time.

        Bound it with ``trio.fail_after``.

        Raises:
            Unavailable: there is no runner, it ended first, or it could not write.
        """
        if not self.running:
            raise Unavailable("no worker of this job runs here")
        self._saved, self._save_error = trio.Event(), ""
        self.send(order, nursery)
        await self._saved.wait()
        if self._save_error:
            raise Unavailable(self._save_error)

    def _settle_save(self, error: str) -> None:
        if self._saved is not None and not self._saved.is_set():
            self._save_error = error
            self._saved.set()

    async def _run(
        self, commands: trio.MemoryReceiveChannel[Command], scope: trio.CancelScope
    ) -> None:
        failure: FabricError | None = None
        with scope:
            try:
                async with self._turn, self._factory(self._context) as runner:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pump, runner)
                        await self._feed(runner, commands)
            except* FabricError as group:
                failure = _first(group)
        if self._scope is scope:
            self._scope, self._commands = None, None
        commands.close()
        self._settle_save("the worker ended before the checkpoint was written")
        if failure is not None and not scope.cancel_called:
            job, me = self._context.job[:8], short(self._context.peer_id)
            logger.warning("job.runner job=%s peer=%s %s", job, me, failure)
            await self._emit(RunnerFailed(failure.code, failure.reason[:500]))

    async def _feed(
        self, runner: Runner, commands: trio.MemoryReceiveChannel[Command]
    ) -> None:
        async for command in commands:
            match command:
                case Generation():
                    await runner.apply(command)
                case RoundDecision():
                    await runner.decide(command)
                case SaveTo(directory, at):
                    await runner.save(directory, at)

    async def _pump(self, runner: Runner) -> None:
        while True:
            event = await runner.next_event()
            if isinstance(event, RunnerProgress):
                if CHECKPOINT_FACT in event.facts:
                    self._settle_save("")
                elif failed := event.facts.get(CHECKPOINT_FAILED_FACT):
                    self._settle_save(f"{failed}: {event.facts.get('reason', '')}")
            await self._emit(event)
            if isinstance(event, RunnerFailed):
                self.close()


def _first(group: BaseExceptionGroup[FabricError]) -> FabricError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FabricError)
    return error
