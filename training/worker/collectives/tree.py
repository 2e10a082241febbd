"""Binomial trees: log2(n) latencies. For small data with one root."""

from __future__ import annotations

from collections.abc import Sequence

from training.worker.collectives.schedule import (
    Bundles,
    Message,
    Schedule,
    Span,
    copy,
    side_by_side,
    to_round,
)


def tree_broadcast(members: Sequence[int], span: Span) -> Schedule:
    """Return the broadcast from the first member: each round doubles who has it."""
    count = len(members)
    rounds = []
    have = 1
    while have < count:
        rounds.append(
            to_round(
                copy(members[i], members[have + i], span)
                for i in range(min(have, count - have))
            )
        )
        have *= 2
    return tuple(rounds)


def tree_scatter(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the scatter from the first member: half of the data moves on at a time."""
    count = len(members)
    if count < 2:
        return ()
    middle = (count + 1) // 2
    moved: list[Message] = [
        copy(members[0], members[middle], span)
        for spans in bundles[middle:]
        for span in spans
    ]
    halves = (
        tree_scatter(members[:middle], bundles[:middle]),
        tree_scatter(members[middle:], bundles[middle:]),
    )
    return (to_round(moved), *side_by_side(halves))
