"""Rows of ``fabric jobs``: a job as this peer's seat, or its slot alone, knows it."""

from __future__ import annotations

import msgspec

from fabric.core.ids import JobId, PeerId
from fabric.jobs.seat import Seat
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import JobState, JobStatus


class JobView(msgspec.Struct, frozen=True):
    """One row of ``fabric jobs``; ``reason`` says why nothing happens, if so."""

    job: JobId
    name: str
    kind: str
    state: str
    reason: str
    coordinator: str
    counter: int
    participants: tuple[PeerId, ...]
    round: int
    rounds: int
    loss: float | None
    tokens_per_second: float | None
    facts: dict[str, str | int | float | bool]


def status_of(seat: Seat, now: float) -> JobStatus:
    """Return what the status slot of a job should say, as this peer's seat knows it."""
    train = seat.spec.kind == "train"
    rounds = seat.spec.train.outer.rounds if train else 0
    return JobStatus(
        state=seat.state,
        counter=seat.committed.counter,
        coordinator=seat.committed.coordinator,
        round=min(seat.next_round, rounds),
        rounds=rounds,
        pause=seat.pause(now),
        facts=seat.ledger.slot_facts(now),
    )


def is_news(status: JobStatus, known: JobStatus | None, *, late: bool) -> bool:
    """Return whether to write ``status`` over the slot that says ``known``.

    Args:
        status: What is right now.
        known: What was written last.
        late: The slot is so old that numbers alone are worth a write, which every peer
            of the mesh stores.
    """
    if known is None or status == known:
        return known is None
    return (
        late
        or msgspec.structs.replace(status, round=known.round, facts=known.facts)
        != known
    )


def view_of_seat(seat: Seat, now: float, fault: str = "") -> JobView:
    """Return a job's row as this peer's seat knows it."""
    status = status_of(seat, now)
    reason = status.pause.reason if status.pause is not None else seat.reason
    if fault:
        reason = f"stopped here: {fault}"
    return _view(
        seat.job,
        seat.spec,
        status,
        reason,
        seat.committed.participants,
        seat.ledger.facts(now),
    )


def view_of_status(job: JobId, spec: JobSpec, status: JobStatus | None) -> JobView:
    """Return a job's row from its replicated status alone."""
    status = status or JobStatus(state=JobState.QUEUED)
    reason = status.pause.reason if status.pause is not None else ""
    reason = reason or str(status.facts.get("reason", ""))
    return _view(job, spec, status, reason, (), status.facts)


def _view(
    job: JobId,
    spec: JobSpec,
    status: JobStatus,
    reason: str,
    participants: tuple[PeerId, ...],
    facts: dict[str, str | int | float | bool],
) -> JobView:
    loss, speed = facts.get("loss"), facts.get("tokens_per_second")
    return JobView(
        job=job,
        name=spec.name,
        kind=spec.kind,
        state=status.state.value,
        reason=reason,
        coordinator=status.coordinator or spec.submitter,
        counter=status.counter,
        participants=participants,
        round=status.round,
        rounds=status.rounds,
        loss=loss if isinstance(loss, float) else None,
        tokens_per_second=speed if isinstance(speed, float) else None,
        facts=facts,
    )
