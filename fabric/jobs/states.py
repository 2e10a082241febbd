"""The state of a job, as a table.

    queued -> running -> done
       |         |-----> failed
       +---------+-----> failed, cancelled

A status is replicated by several writers, so states form a lattice: merging takes the
higher rank. Terminal states do not leave each other; between two of them the rank
decides, the same on every peer. *Paused* is not a state: a queued or running job may
carry a :class:`Pause` that says why nothing happens and what ends it.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.errors import LocalProtocolError
from fabric.jobs.messages import Count, FactDict, Peer, Reason


class JobState(Enum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Trigger(Enum):
    """What moves a job on."""

    STARTED = "started"
    COMPLETED = "completed"
    BROKE = "broke"
    STOPPED = "stopped"


_S, _E = JobState, Trigger
TRANSITIONS: dict[JobState, dict[Trigger, JobState]] = {
    _S.QUEUED: {
        _E.STARTED: _S.RUNNING,
        _E.BROKE: _S.FAILED,
        _E.STOPPED: _S.CANCELLED,
    },
    _S.RUNNING: {
        _E.COMPLETED: _S.DONE,
        _E.BROKE: _S.FAILED,
        _E.STOPPED: _S.CANCELLED,
        _E.STARTED: _S.RUNNING,
    },
    _S.DONE: {},
    _S.FAILED: {},
    _S.CANCELLED: {},
}

RANK = {state: rank for rank, state in enumerate(JobState)}
"""Order of the lattice: queued < running < done < failed < cancelled."""


def advance(state: JobState, event: Trigger) -> JobState:
    """Return the state after ``event``.

    Raises:
        LocalProtocolError: ``event`` cannot happen in ``state``.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise LocalProtocolError(f"job: {event.value} in state {state.value}") from None


def merge(one: JobState, other: JobState) -> JobState:
    """Return the join of two replicas' states."""
    return max(one, other, key=RANK.__getitem__)


def is_over(state: JobState) -> bool:
    """Return whether nothing can follow ``state``."""
    return not TRANSITIONS[state]


class Pause(msgspec.Struct, frozen=True):
    """Why a job that is not over makes no progress, and what would change that."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Reason
    next_step: Reason = ""


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the status slot of a job holds; written by its coordinator."""

    state: JobState
    counter: Count = 0
    coordinator: Peer | None = None
    round: Count = 0
    rounds: Count = 0
    pause: Pause | None = None
    facts: FactDict = {}


STATUS: Codec[JobStatus] = Codec(JobStatus, max_bytes=4096)


def fold(statuses: list[JobStatus]) -> JobStatus | None:
    """Return the status that several writers' slots amount to.

    The highest state wins; among equals the newest epoch, then the later round.
    """
    return max(
        statuses,
        key=lambda s: (RANK[s.state], s.counter, s.round, s.coordinator or ""),
        default=None,
    )
