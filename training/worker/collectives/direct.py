"""Every member to every other at once: one latency, and all links in use."""

from __future__ import annotations

from collections.abc import Sequence

from training.worker.collectives.schedule import (
    Bundles,
    Do,
    Message,
    Op,
    Program,
    Schedule,
    Span,
    copy,
    spans_of,
    to_round,
    transposed,
)


def direct_all_gather(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the all-gather in which each sends what it holds to each other.

    In the order of distance, so that no target is everyone's first.
    """
    count = len(members)
    return (
        to_round(
            copy(members[i], members[(i + s) % count], span)
            for s in range(1, count)
            for i in range(count)
            for span in bundles[i]
        ),
    )


def direct_reduce_scatter(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the reduce-scatter in which each sends each part to its owner."""
    return transposed(direct_all_gather(members, bundles))


def direct_scatter(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the scatter in which the first member sends each its part."""
    return (
        to_round(
            copy(members[0], member, span)
            for member, spans in zip(members, bundles, strict=True)
            for span in spans
        ),
    )


def all_to_all(sizes: Sequence[Sequence[int]]) -> Schedule:
    """Return the exchange of ``sizes[i][j]`` elements from rank i to rank j.

    A rank's address space is its input and then its output, each in rank order. What
    stays with a rank is not a message: its own copy is the caller's.
    """
    count = len(sizes)
    given = [spans_of(row) for row in sizes]
    taken = [spans_of([row[j] for row in sizes]) for j in range(count)]
    inputs = [sum(row) for row in sizes]
    return (
        to_round(
            Message(i, j, given[i][j], inputs[j] + taken[j][i].start)
            for s in range(1, count)
            for i in range(count)
            for j in [(i + s) % count]
        ),
    )


def dissemination(members: Sequence[int]) -> Schedule:
    """Return the barrier: after round k each has heard of 2^(k+1) - 1 others.

    A rank's space holds one element per round, so that rounds do not overtake.
    """
    count = len(members)
    rounds = []
    distance, number = 1, 0
    while distance < count:
        # reads what the round before wrote: nobody sends before it has heard
        rounds.append(
            to_round(
                Message(
                    members[i],
                    members[(i + distance) % count],
                    Span(number, number + 1),
                    number + 1,
                )
                for i in range(count)
            )
        )
        distance *= 2
        number += 1
    return tuple(rounds)


def all_to_all_program(
    rank: int, given: Sequence[int], taken: Sequence[int]
) -> Program:
    """Return one rank's part of :func:`all_to_all`, for which its own sizes suffice.

    Args:
        rank: Ours.
        given: Elements for each rank.
        taken: Elements from each rank.
    """
    count = len(given)
    inputs, outputs = spans_of(given), spans_of(taken)
    behind = sum(given)
    sends = [(rank + s) % count for s in range(1, count)]
    receives = [(rank - s) % count for s in range(1, count)]
    ops = [Op(Do.SEND, peer, inputs[peer]) for peer in sends]
    for peer in receives:
        span = outputs[peer]
        into = Span(behind + span.start, behind + span.stop)
        ops.append(Op(Do.RECEIVE, peer, into))
    return tuple(op for op in ops if op.span.size)
