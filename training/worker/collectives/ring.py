"""Rings: every link carries the same bytes; the time does not grow with the ranks.

    round s:  member i sends part (i - s) to member i + 1

Bandwidth-optimal, with n - 1 latencies: for large data. Source: Patarasuk and Yuan
2009, doi:10.1016/j.jpdc.2008.09.002.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from training.worker.collectives.schedule import (
    Bundles,
    Schedule,
    Span,
    copy,
    to_round,
    transposed,
)


def ring_all_gather(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the all-gather around the ring ``members``."""
    count = len(members)
    return tuple(
        to_round(
            copy(members[i], members[(i + 1) % count], span)
            for i in range(count)
            for span in bundles[(i - s) % count]
        )
        for s in range(count - 1)
    )


def ring_reduce_scatter(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the reduce-scatter around the ring, in the all-gather's direction."""
    return transposed(ring_all_gather(members[::-1], bundles[::-1]))


def chain_broadcast(members: Sequence[int], span: Span) -> Schedule:
    """Return the broadcast from the first member down the chain.

    The pieces of a span follow each other through the chain, so for large data it
    takes the time of one link.
    """
    return tuple(to_round([copy(a, b, span)]) for a, b in pairwise(members))
