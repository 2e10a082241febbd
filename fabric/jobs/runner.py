"""What a job kind supplies: a runner per job and peer; training and inference do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Generation, RoundDecision, RoundReport, StateHeld
from fabric.jobs.spec import JobSpec

Facts = Mapping[str, str | int | float | bool]

LINK_FACT = "bytes_by_link:"
"""A fact "bytes_by_link:<peer id>" counts the bytes this worker sent to that peer so
far. The jobs service merges them into the job's "bytes_by_link:<from>><to>", both ends
in short form."""

CHECKPOINT_FAILED_FACT = "checkpoint_failed"
"""A RunnerProgress with this fact (a code) says that :meth:`Runner.save` failed."""

SOURCES_FACT = "state_sources"
"""From how many peers a newcomer got its state; "state_sources:<peer>" in the job's."""

HOT_FACT = "hot_round"
"""The round whose start state is kept in memory outside the worker."""

RESUMED_ROUND_FACT, RESUMED_STATE_FACT = "resumed_round", "resumed_state"
"""Of a job that resumed: its first round, and the digest of the state it started with,
as its workers computed it from the checkpoint."""

CHECKPOINT_FACT = "checkpoint"
"""A RunnerProgress with this fact (the directory) answers :meth:`Runner.save`."""


class RunnerProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Numbers for people: loss, tokens/s, bytes by link. Never decides anything."""

    facts: dict[str, str | int | float | bool]


class RunnerResult(msgspec.Struct, frozen=True, tag="result"):
    """This peer's part of the job is complete.

    Attributes:
        facts: For the summary: parameter digest, checkpoint root, path.
    """

    facts: dict[str, str | int | float | bool]


class RunnerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker ended and cannot go on here; other peers can."""

    code: str
    reason: str


RunnerEvent = RoundReport | StateHeld | RunnerProgress | RunnerResult | RunnerFailed


class Runner(Protocol):
    """Runs one job on this peer: owns the worker process and its sockets.

    Opened by ``async with factory(context) as runner``: leaving ends the worker.
    """

    async def apply(self, generation: Generation) -> None:
        """Take part in ``generation``.

        Sockets to its participants, state from its sources. A later generation
        replaces an earlier one at any time.
        """
        ...

    async def decide(self, decision: RoundDecision) -> None:
        """Apply the coordinator's choice for a round."""
        ...

    async def save(self, directory: Path, at: int) -> None:
        """Write the state of round ``at`` as a checkpoint beside the rounds going on.

        RunnerProgress says when it is done.
        """
        ...

    async def next_event(self) -> RunnerEvent:
        """Return the next fact; waits for ever, so the owner's scope bounds it."""
        ...


class RunnerFactory(Protocol):
    """Opens a runner: ``async with factory(context) as runner``."""

    def __call__(self, context: RunnerContext) -> AbstractAsyncContextManager[Runner]:
        """Return the context manager that owns the worker."""
        ...


class RunnerContext(Protocol):
    """What the jobs service hands to a runner factory."""

    @property
    def job(self) -> JobId:
        """The job."""
        ...

    @property
    def spec(self) -> JobSpec:
        """Its spec."""
        ...

    @property
    def peer_id(self) -> PeerId:
        """This peer."""
        ...

    @property
    def scratch(self) -> Path:
        """Directory of this job on this peer; exists, survives the runner."""
        ...
