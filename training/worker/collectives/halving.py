"""Recursive doubling and halving: log2(n) latencies and, for parts, optimal bytes.

For powers of two members exchange with the partner whose index differs in one bit;
for other counts, in round k member i sends to i - 2^k the parts that it has and the
target lacks (Bruck's order), which needs no folding and moves no byte twice. Turned
around it is recursive halving. Source: Thakur, Rabenseifner, Gropp 2005,
doi:10.1177/1094342005051521.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.worker.collectives.schedule import (
    Bundles,
    Message,
    Schedule,
    Span,
    copy,
    to_round,
    transposed,
)


def doubling_all_gather(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the all-gather in ceil(log2(n)) rounds."""
    count = len(members)
    partner = _by_bit if count & (count - 1) == 0 else _by_distance
    rounds = []
    have = 1
    while have < count:
        rounds.append(
            to_round(
                copy(members[i], members[target], span)
                for i in range(count)
                for target, part in partner(i, have, count)
                for span in bundles[part]
            )
        )
        have *= 2
    return tuple(rounds)


def halving_reduce_scatter(members: Sequence[int], bundles: Bundles) -> Schedule:
    """Return the reduce-scatter in ceil(log2(n)) rounds."""
    return transposed(doubling_all_gather(members, bundles))


def exchange_all_reduce(members: Sequence[int], span: Span) -> Schedule:
    """Return the all-reduce in which partners exchange everything: for tiny data.

    Where the count is no power of two, the members above it hand their data to a
    partner first and get the result from it last.
    """
    count = len(members)
    power = 1 << (count.bit_length() - 1)
    folded = [(power + i, i) for i in range(count - power)]
    rounds = [to_round(_into(members[a], members[b], span) for a, b in folded)]
    bit = 1
    while bit < power:
        rounds.append(
            to_round(_into(members[i], members[i ^ bit], span) for i in range(power))
        )
        bit *= 2
    rounds.append(to_round(copy(members[b], members[a], span) for a, b in folded))
    return tuple(rounds)


def _into(source: int, target: int, span: Span) -> Message:
    return Message(source, target, span, span.start, reduce=True)


def _by_bit(i: int, have: int, _count: int) -> list[tuple[int, int]]:
    """Return (target, part) pairs of member ``i`` when everyone has ``have`` parts."""
    block = i & ~(have - 1)
    return [(i ^ have, block + j) for j in range(have)]


def _by_distance(i: int, have: int, count: int) -> list[tuple[int, int]]:
    """The same where i has parts i .. i + have - 1, and i - have lacks them."""
    return [
        ((i - have) % count, (i + j) % count) for j in range(min(have, count - have))
    ]
