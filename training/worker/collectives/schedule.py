"""A collective as data: rounds of messages between ranks, one address space each.

    Schedule = rounds; a round = messages that happen at once

Every rank has one flat address space of elements (what an address means is up to the
caller: one tensor, or several end to end). A message copies or reduces a span of the
source's space into the target's. In a round all messages read what was there before
the round; rounds follow one another. This is what a schedule *means*. Ranks do not run
in step: each follows its own :func:`program` and waits only where spans overlap
(``hazards.py``); the symbolic executor shows that this comes to the same.

Two schedules are one: turned around (:func:`transposed`), an all-gather is a
reduce-scatter and a broadcast a reduce. A copy that reaches each rank once becomes a
contribution that is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise, zip_longest


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``start`` to ``stop``, not including ``stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Message:
    """``span`` of ``source`` goes to address ``at`` of ``target``.

    Attributes:
        source: Rank.
        target: Rank.
        span: Read at the source.
        at: First address written at the target.
        reduce: Whether the target combines it with what it has, or overwrites.
    """

    source: int
    target: int
    span: Span
    at: int
    reduce: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """``span`` of ``rank`` holds every contribution: divide, if the mean is wanted."""

    rank: int
    span: Span


Step = Message | Finish
Round = tuple[Step, ...]
Schedule = tuple[Round, ...]
Bundles = Sequence[Sequence[Span]]
"""What each member holds at the start: one sequence of spans per member."""


class Do(Enum):
    """What a rank does with a span of its own."""

    SEND = "send"
    RECEIVE = "receive"
    REDUCE = "reduce"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Op:
    """One rank's part of a step; ``peer`` is -1 where there is none."""

    do: Do
    peer: int
    span: Span

    @property
    def writes(self) -> bool:
        """Whether the span changes."""
        return self.do is not Do.SEND


Program = tuple[Op, ...]


def program(schedule: Schedule, rank: int) -> Program:
    """Return what ``rank`` does, in order: in each round it sends first."""
    ops: list[Op] = []
    for steps in schedule:
        arriving: list[Op] = []
        for step in steps:
            match step:
                case Finish(owner, span):
                    if owner == rank:
                        arriving.append(Op(Do.FINISH, -1, span))
                case Message(source, target, span, at, reduce):
                    if source == rank:
                        ops.append(Op(Do.SEND, target, span))
                    if target == rank:
                        into = Span(at, at + span.size)
                        do = Do.REDUCE if reduce else Do.RECEIVE
                        arriving.append(Op(do, source, into))
        ops.extend(arriving)
    return tuple(ops)


def copy(source: int, target: int, span: Span) -> Message:
    """Return a message to the same address."""
    return Message(source, target, span, span.start)


def to_round(steps: Iterable[Step]) -> Round:
    """Return a round without messages of no elements or to oneself."""
    return tuple(
        step
        for step in steps
        if step.span.size
        and not (isinstance(step, Message) and step.source == step.target)
    )


def transposed(schedule: Schedule) -> Schedule:
    """Return the schedule that adds up what ``schedule`` spreads.

    Args:
        schedule: Copies only, each element reaching a rank at most once.
    """
    return tuple(
        tuple(_turned(step, reduce=True) for step in steps)
        for steps in reversed(schedule)
    )


def reversed_paths(schedule: Schedule) -> Schedule:
    """Return the schedule that collects what ``schedule`` hands out (scatter, gather).

    Args:
        schedule: Copies only, each element travelling one path.
    """
    return tuple(
        tuple(_turned(step, reduce=False) for step in steps)
        for steps in reversed(schedule)
    )


def side_by_side(schedules: Iterable[Schedule]) -> Schedule:
    """Return one schedule of several that share no rank."""
    return tuple(
        tuple(step for steps in rounds for step in steps)
        for rounds in zip_longest(*schedules, fillvalue=())
    )


def connections(schedule: Schedule) -> int:
    """Return how many one-way connections ``schedule`` uses."""
    return len(
        {
            (step.source, step.target)
            for steps in schedule
            for step in steps
            if isinstance(step, Message)
        }
    )


def finish(owners: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the round in which each owner finishes what it holds."""
    return (
        to_round(
            Finish(owner, span)
            for owner, spans in zip(owners, bundles, strict=True)
            for span in spans
        ),
    )


def spans_of(sizes: Sequence[int]) -> tuple[Span, ...]:
    """Return the spans of parts that lie end to end."""
    ends = list(accumulate(sizes, initial=0))
    return tuple(Span(a, b) for a, b in pairwise(ends))


def even_sizes(total: int, parts: int) -> tuple[int, ...]:
    """Return ``total`` in ``parts`` sizes that differ by one at most."""
    small, larger = divmod(total, parts)
    return tuple(small + (i < larger) for i in range(parts))


def _turned(step: Step, *, reduce: bool) -> Message:
    if not isinstance(step, Message) or step.reduce:
        raise ValueError("only a schedule of copies can be turned around")
    source = Span(step.at, step.at + step.span.size)
    return Message(step.target, step.source, source, step.span.start, reduce)
