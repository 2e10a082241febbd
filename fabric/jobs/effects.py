"""What a :class:`~fabric.jobs.seat.Seat` asks its shell to do, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from fabric.core.ids import PeerId
from fabric.jobs.messages import Generation, JobMessage, RoundDecision
from fabric.jobs.promises import PromiseRecord
from fabric.jobs.states import JobState

Fact = str | int | float | bool


@dataclass(frozen=True)
class Persist:
    """Write the promise with a full sync before anything after it is done."""

    record: PromiseRecord


@dataclass(frozen=True)
class Apply:
    """Our runner takes part in ``generation``; open one if there is none."""

    generation: Generation


@dataclass(frozen=True)
class Retire:
    """We do not take part (any more): close the runner."""


@dataclass(frozen=True)
class Decide:
    """Our runner applies the decision."""

    decision: RoundDecision


@dataclass(frozen=True)
class SaveState:
    """Our runner writes the state of ``round`` as a checkpoint."""

    round: int


@dataclass(frozen=True)
class Restore:
    """Bring the state of the job's newest checkpoint here: nobody holds one."""


@dataclass(frozen=True)
class Publish:
    """The replicated status, and the assignment if ``generation``, changed."""

    generation: Generation | None = None


@dataclass(frozen=True)
class Recorded:
    """An event for the job's log."""

    kind: str
    peer: PeerId | None = None
    facts: dict[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class Diverged:
    """Participants hold different states of one round."""

    num_peers: int


@dataclass(frozen=True)
class Ended:
    """The job is over; nothing follows for this peer but answers."""

    state: JobState


Effect = (
    Persist
    | Apply
    | Retire
    | Decide
    | SaveState
    | Restore
    | Publish
    | Recorded
    | Diverged
    | Ended
)


@dataclass(frozen=True)
class Outputs:
    """Perform ``effects`` in order, then start ``sends``."""

    effects: tuple[Effect, ...]
    sends: tuple[tuple[PeerId, JobMessage], ...]
