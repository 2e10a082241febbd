"""Islands: a byte crosses a slow boundary once, fast links do the rest.

A :data:`Group` nests: ``((0, 1), (2, 3))`` is two islands of two. The all-gather sends
each member's part to one member of each other island, then gathers inside. Turned
around it reduces inside before anything leaves. Any depth, any uneven sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Union

from training.worker.collectives.schedule import (
    Bundles,
    Message,
    Schedule,
    Span,
    copy,
    side_by_side,
    to_round,
    transposed,
)

Group = tuple[Union[int, "Group"], ...]
Gather = Callable[[Sequence[int], Bundles], Schedule]
Spread = Callable[[Sequence[int], Span], Schedule]


def members_of(group: int | Group) -> tuple[int, ...]:
    """Return the ranks of ``group``, islands end to end."""
    if isinstance(group, int):
        return (group,)
    return tuple(rank for child in group for rank in members_of(child))


def island_all_gather(
    group: int | Group, held: Mapping[int, Sequence[Span]], inside: Gather
) -> Schedule:
    """Return the all-gather of what each rank of ``group`` holds.

    Args:
        group: Islands, nested.
        held: By rank.
        inside: The all-gather of an island without islands.
    """
    if isinstance(group, int):
        return ()
    if all(isinstance(child, int) for child in group):
        members = members_of(group)
        return inside(members, [held[rank] for rank in members])
    children = [members_of(child) for child in group]
    crossing: list[Message] = []
    then = {rank: list(held[rank]) for rank in members_of(group)}
    for here in children:
        for there in children:
            if here is there:
                continue
            for number, rank in enumerate(here):
                target = there[number % len(there)]
                crossing += [copy(rank, target, span) for span in held[rank]]
                then[target] += held[rank]
    return (
        to_round(crossing),
        *side_by_side(island_all_gather(child, then, inside) for child in group),
    )


def island_reduce_scatter(
    group: Group, held: Mapping[int, Sequence[Span]], inside: Gather
) -> Schedule:
    """Return the reduce-scatter to ``held``: inside islands first, then across."""
    return transposed(island_all_gather(group, held, inside))


def island_broadcast(
    group: int | Group, root: int, span: Span, spread: Spread
) -> Schedule:
    """Return the broadcast from ``root``: to one member of each island, then inside.

    Args:
        group: Islands, nested; ``root`` is in one of them.
        root: Rank.
        span: What is spread.
        spread: A broadcast from the first of its members.
    """
    if isinstance(group, int):
        return ()
    heads = [
        root if root in members else members[0] for members in map(members_of, group)
    ]
    first = [root, *(head for head in heads if head != root)]
    inner = (
        island_broadcast(child, head, span, spread)
        for child, head in zip(group, heads, strict=True)
    )
    return (*spread(first, span), *side_by_side(inner))
