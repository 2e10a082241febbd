"""The daemon's side of a training job: a runner for the jobs service.

    jobs service --apply, decide, save--> TrainRunner --commands + sockets--> worker
                 <---- next_event -------             <------ events --------

No tensor passes through here.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from fabric.core.ids import PeerId
from fabric.core.signing import Signer
from fabric.jobs.messages import Generation, RoundDecision, RoundReport
from fabric.jobs.runner import (
    CHECKPOINT_FACT,
    HOT_FACT,
    LINK_FACT,
    RunnerContext,
    RunnerEvent,
    RunnerFactory,
    RunnerFailed,
    RunnerProgress,
    RunnerResult,
)
from fabric.jobs.spec import JobSpec
from fabric.net.paths_api import Paths
from fabric.net.tasks import collapse_group
from training.config import TrainConfig
from training.hot_keeper import HotKeeper, HotKeeping
from training.messages import (
    ApplyGeneration,
    Decide,
    Event,
    Finished,
    Held,
    HotFailed,
    HotWritten,
    LinkMoved,
    Numbers,
    RoundReported,
    SaveCheckpoint,
    Saved,
    SaveFailed,
)
from training.worker_service import LiveWorker

MAX_EVENTS = 256
"""Events that wait for the jobs service; then the worker's own sends wait."""


Obtain = Callable[[JobSpec, Path], Awaitable[None]]
"""Has what a job resumes from as a new directory; bounded by itself."""


def train_runner_factory(
    paths: Paths,
    signer: Signer,
    config: TrainConfig,
    *,
    obtain: Obtain | None = None,
    hot: HotKeeping | None = None,
    clock: Callable[[], float] = time.time,
) -> RunnerFactory:
    """Return the factory that the jobs service calls for jobs of kind "train".

    Args:
        paths: Opens and accepts sockets.
        signer: Signs the workers' job certificates.
        config: Limits of this machine.
        obtain: Gets the checkpoint that a job resumes from.
        hot: Keeps states outside the workers; None: nobody does.
        clock: Unix seconds, for certificates.
    """

    @asynccontextmanager
    async def open_runner(context: RunnerContext) -> AsyncIterator[TrainRunner]:
        resume: Path | None = None
        if context.spec.resume and obtain is not None:
            resume = context.scratch / "resume"
            if not await trio.to_thread.run_sync(resume.is_dir):
                await obtain(context.spec, resume)
        runner = TrainRunner(context, paths, signer, config, clock, resume, hot)
        with collapse_group():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runner.run)
                yield runner
                nursery.cancel_scope.cancel()

    return open_runner


class TrainRunner:
    """Runs one training job on this peer: a :class:`fabric.jobs.runner.Runner`."""

    def __init__(
        self,
        context: RunnerContext,
        paths: Paths,
        signer: Signer,
        config: TrainConfig,
        clock: Callable[[], float],
        resume: Path | None,
        hot: HotKeeping | None,
    ) -> None:
        self._context = context
        self._paths = paths
        self._signer = signer
        self._config = config
        self._clock = clock
        self._resume, self._hot = resume, hot
        self._send_event, self._events = trio.open_memory_channel[RunnerEvent](
            MAX_EVENTS
        )
        self._generation: Generation | None = None
        self._entered = trio.Event()
        self._live, self._keeper = self._new_worker()
        self._reported: RoundReport | None = None
        self._unreachable: frozenset[PeerId] = frozenset()

    async def apply(self, generation: Generation) -> None:
        """Take part in ``generation``; a worker that died is started again for it."""
        if self._generation and generation.counter <= self._generation.counter:
            return
        self._generation = generation
        self._reported = None
        self._entered.set()
        if self._keeper is not None:
            await self._keeper.enter(generation)
        await self._live.tell(ApplyGeneration(generation))

    async def decide(self, decision: RoundDecision) -> None:
        """Hand the coordinator's choice to the worker."""
        await self._live.tell(Decide(decision))

    async def save(self, directory: Path, at: int) -> None:
        """Have the worker write the start state of round ``at`` under ``directory``.

        The answer is a RunnerProgress with CHECKPOINT_FACT, or with
        "checkpoint_failed" and the reason.
        """
        await self._live.tell(SaveCheckpoint(str(directory), at))

    async def next_event(self) -> RunnerEvent:
        """Return the next fact; waits for ever."""
        return await self._events.receive()

    async def run(self) -> None:
        """Keep a worker alive, as long as starting it again makes sense."""
        for attempt in range(1 + self._config.max_restarts):
            try:
                ended = await self._live.run()
            finally:
                if self._keeper is not None:
                    self._keeper.close()
            again = ended.may_restart and attempt < self._config.max_restarts
            if again:
                self._live, self._keeper = self._new_worker()
                self._entered = trio.Event()
            await self._send_event.send(RunnerFailed(ended.code, ended.reason))
            if not again:
                return
            # It has lost its state: only a new generation says where to get one.
            await self._entered.wait()

    def _new_worker(self) -> tuple[LiveWorker, HotKeeper | None]:
        live = LiveWorker(
            self._context,
            self._paths,
            self._signer,
            self._config,
            clock=self._clock,
            report=self._worker_says,
            report_paths=self._paths_changed,
            resume=self._resume,
        )
        if self._hot is None:
            return live, None
        job, spec = self._context.job, self._context.spec
        return live, HotKeeper(self._hot, job, spec, live.tell_with)

    async def _worker_says(self, event: Event) -> None:
        if isinstance(event, RoundReported):
            self._reported = event.report
            await self._send_report()
        elif isinstance(event, HotWritten | HotFailed):
            await self._hot_says(event)
        elif (translated := translate(event)) is not None:
            await self._send_event.send(translated)
        if isinstance(event, Held) and self._keeper is not None:
            await self._keeper.held(event.held)

    async def _hot_says(self, event: HotWritten | HotFailed) -> None:
        if self._keeper is None:
            return
        if isinstance(event, HotFailed):
            await self._keeper.failed(event.digest)
        elif (at := await self._keeper.written(event.digest)) is not None:
            await self._send_event.send(RunnerProgress({HOT_FACT: at}))

    async def _paths_changed(self, unreachable: frozenset[PeerId]) -> None:
        self._unreachable = unreachable
        await self._send_report()

    async def _send_report(self) -> None:
        """Send the worker's newest report, with the peers we find no path to."""
        if self._reported is None:
            return
        broken = sorted(self._unreachable.union(self._reported.broken))
        report = msgspec.structs.replace(self._reported, broken=tuple(broken))
        await self._send_event.send(report)


def translate(event: Event) -> RunnerEvent | None:
    """Return what the jobs service is told about ``event``, or None for nothing."""
    match event:
        case Held(held):
            return held
        case Numbers(facts):
            return RunnerProgress(finite(facts))
        case LinkMoved(peer, path, sent, received):
            return RunnerProgress(
                {
                    f"{LINK_FACT}{peer}": sent,
                    f"received_by_link:{peer}": received,
                    f"path:{peer}": path,
                }
            )
        case Saved(directory, root, number, size):
            return RunnerProgress(
                {
                    CHECKPOINT_FACT: directory,
                    "checkpoint_root": root,
                    "checkpoint_round": number,
                    "checkpoint_bytes": size,
                }
            )
        case SaveFailed(directory, code, reason):
            return RunnerProgress(
                {"checkpoint_failed": code, "directory": directory, "reason": reason}
            )
        case Finished(facts):
            return RunnerResult(finite(facts))
        case _:
            return None


def finite(
    facts: dict[str, str | int | float | bool],
) -> dict[str, str | int | float | bool]:
    """Return ``facts`` without NaN and infinities, which JSON cannot carry."""
    return {
        name: value
        for name, value in facts.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
