"""From what both ends say of a link to one distance, equal on every peer.

A distance is the time per byte times the root of the round trip, in 1/256 of a factor
of two. It needs no floating point, so no library's logarithm can part two peers that
hold the same records. The root damps the round trip: bandwidth decides how long a
collective takes, latency adds to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from crdt_store.link_records import LinkRecord, PublishedLink
from fabric.core.ids import PeerId

DOUBLING = 256
"""Distance that a factor of two makes."""
_BITS = 8
_POINT = 40
FLOOR_MICROSECONDS = 1000
"""Shorter round trips are scheduling noise, and published as this."""
CONTRADICTION = 2
"""Two ends that differ by more than this factor contradict each other."""
_FAR = 1 << 50
"""Longest round trip believed, in microseconds; keeps a liar's numbers small."""


class Link(NamedTuple):
    """What a pair's link is taken to be: as bad as the worse of its ends says.

    Attributes:
        rtt_microseconds: Round trip; 0 when nobody measured it.
        there: Bytes per second from the smaller id to the greater; 0: not measured.
        back: Bytes per second the other way; 0: not measured.
        is_disputed: The ends differ by more than :data:`CONTRADICTION` in something.
        is_relayed: A third peer carries it, as one of the ends says.
    """

    rtt_microseconds: int
    there: int
    back: int
    is_disputed: bool = False
    is_relayed: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether there is enough to place its ends."""
        return self.rtt_microseconds > 0 and max(self.there, self.back) > 0

    @property
    def slower(self) -> int:
        """Return bytes per second of the slower direction that was measured."""
        return min((rate for rate in (self.there, self.back) if rate), default=0)


Pair = tuple[PeerId, PeerId]
Links = dict[Pair, Link]


def merge(
    records: Mapping[PeerId, LinkRecord], members: Iterable[PeerId]
) -> tuple[tuple[PeerId, ...], Links]:
    """Return the members in order, and the link of each pair that anybody measured.

    Who measured does not matter: exchanging the two ends' records changes nothing. A
    value that one end lacks is taken from the other; of two the worse counts, so that
    no peer can make its links look better than the other end sees them.

    Args:
        records: By author; what they say of others than members is left out.
        members: Of the job.
    """
    order = tuple(sorted(set(members)))
    known = frozenset(order)
    said: dict[Pair, list[tuple[PublishedLink, bool]]] = {}
    for author in order:
        record = records.get(author)
        for other, link in (record.links if record is not None else {}).items():
            peer = PeerId(other)
            if peer in known and peer != author:
                pair = (author, peer) if author < peer else (peer, author)
                said.setdefault(pair, []).append((link, author > peer))
    return order, {pair: _agreed(said[pair]) for pair in sorted(said)}


def _agreed(said: list[tuple[PublishedLink, bool]]) -> Link:
    rtts = [min(link.rtt_microseconds, _FAR) for link, _ in said]
    ups = [(link.up_bytes_per_second, link.down_bytes_per_second) for link, _ in said]
    turned = [
        (down, up) if mirrored else (up, down)
        for (up, down), (_, mirrored) in zip(ups, said, strict=True)
    ]
    there = [rate for rate, _ in turned if rate]
    back = [rate for _, rate in turned if rate]
    rtts = [max(rtt, FLOOR_MICROSECONDS) for rtt in rtts if rtt]
    return Link(
        max(rtts, default=0),
        min(there, default=0),
        min(back, default=0),
        any(map(_differ, (rtts, there, back))),
        any(link.path == "relay" for link, _ in said),
    )


def _differ(values: list[int]) -> bool:
    return bool(values) and max(values) > CONTRADICTION * min(values)


def distance(link: Link) -> int | None:
    """Return how far a link's ends are apart, or None when it was not measured."""
    if not link.is_measured:
        return None
    return log2_fixed(link.rtt_microseconds) // 2 - log2_fixed(link.slower)


def log2_fixed(value: int) -> int:
    """Return log2 of ``value`` >= 1 in 1/256, rounded down; integers alone."""
    whole = value.bit_length() - 1
    rest = (value << _POINT) >> whole
    result = whole
    for _ in range(_BITS):
        rest = rest * rest >> _POINT
        carry = rest >> (_POINT + 1)
        rest >>= carry
        result = result << 1 | carry
    return result


def factor(steps: int) -> float:
    """Return the factor that a difference of distances stands for."""
    return float(2 ** (steps / DOUBLING))
