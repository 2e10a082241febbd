"""A job's events, bounded, numbered so that a change of coordinator keeps the order.

A number is (epoch counter, running number in that epoch), packed into one integer: what
a successor records always sorts after what its predecessor recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.ids import PeerId, short
from fabric.jobs.messages import Count, FactDict, Job
from fabric.jobs.states import JobStatus

_SHIFT = 24
"""16 million events per epoch, 500 million epochs: together below 2**53."""

MAX_EVENTS_PER_REPLY = 500

MAX_NAMED = 50
"""Participants named in an event: 9 characters each, a fact has at most 500."""


class JobEvent(msgspec.Struct, frozen=True):
    """Something that happened in a job.

    Attributes:
        seq: Increasing within a job, across coordinators; 0 is before everything.
        time: Seconds since 1970 on the clock of whoever recorded it.
        kind: "generation", "round", "validated", "worker_failed", "done", ...
        peer: Whom it is about, or empty.
        facts: Numbers and names.
    """

    seq: Count
    time: float
    kind: Annotated[str, msgspec.Meta(max_length=64)]
    peer: Annotated[str, msgspec.Meta(max_length=64)] = ""
    facts: FactDict = {}


class EventsRequest(msgspec.Struct, frozen=True, tag="events_request"):
    """Events of ``job`` after number ``since``."""

    job: Job
    since: Count = 0


class EventsReply(msgspec.Struct, frozen=True, tag="events_reply"):
    """The oldest events that fit; ask again with the last one's number."""

    events: Annotated[
        tuple[JobEvent, ...], msgspec.Meta(max_length=MAX_EVENTS_PER_REPLY)
    ]


class StopRequest(msgspec.Struct, frozen=True, tag="stop_request"):
    """Cancel ``job``."""

    job: Job


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """Whether the receiver could stop it."""

    ok: bool


SIDE_CODEC: Codec[EventsRequest | EventsReply | StopRequest | Stopped] = Codec(
    EventsRequest | EventsReply | StopRequest | Stopped, max_bytes=4 << 20
)


class EventLog:
    """The newest events of one job.

    Args:
        max_events: How many are kept.
    """

    def __init__(self, max_events: int) -> None:
        self._events: deque[JobEvent] = deque(maxlen=max_events)
        self._last = 0

    def add(
        self,
        counter: int,
        time: float,
        kind: str,
        peer: str,
        facts: FactDict,
    ) -> JobEvent:
        """Record an event in epoch ``counter`` and return it, numbered."""
        seq = max(self._last + 1, (counter << _SHIFT) + 1)
        event = JobEvent(seq, time, kind, peer, facts)
        self._last = seq
        self._events.append(event)
        return event

    def merge(self, events: Iterable[JobEvent]) -> None:
        """Add events that somebody else numbered; known numbers stay as they are."""
        union = {e.seq: e for e in events} | {e.seq: e for e in self._events}
        self._events = deque(
            (union[seq] for seq in sorted(union)), maxlen=self._events.maxlen
        )
        self._last = max(union, default=self._last)

    def since(self, seq: int) -> list[JobEvent]:
        """Return up to MAX_EVENTS_PER_REPLY events after number ``seq``."""
        found = [event for event in self._events if event.seq > seq]
        return found[:MAX_EVENTS_PER_REPLY]


def last_event(status: JobStatus, time: float) -> JobEvent:
    """Return the event that a status slot alone lets us tell: how the job ended.

    Numbered after everything its coordinators recorded. ``time`` is when it was asked
    for: the slot does not say when the job ended.
    """
    seq = (status.counter + 1) << _SHIFT
    peer = status.coordinator or ""
    return JobEvent(seq, time, status.state.value, peer, status.facts)


def names_of(peers: Sequence[PeerId]) -> str:
    """Return the short ids of up to MAX_NAMED ``peers``, joined by commas."""
    return ",".join(short(peer) for peer in peers[:MAX_NAMED])
