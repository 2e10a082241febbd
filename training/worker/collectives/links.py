"""What is known of the links between the ranks of a group, and what follows from it.

Time of a message = latency + bytes * seconds per byte (alpha-beta), on the pair's link
and, where it leaves an island, on the uplinks of both islands, which their members
share. Everything here is deterministic: every rank computes it from the same
measurements and must come to the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.worker.collectives.hierarchy import Group, members_of

LOCAL_LATENCY_SECONDS = 1e-4
"""Between processes of one host: a wake-up of a thread at each end."""
LOCAL_BYTES_PER_SECOND = 1.5e9
"""Through shared memory on an ordinary machine."""
STEP = 1.1
MAX_IMPROVED = 24
"""Members up to which a ring's order is improved by exchanges: cost grows as n^4."""


@dataclass(frozen=True)
class Links:
    """Measurements of one group.

    Attributes:
        latency: Seconds one way, by [source][target].
        bytes_per_second: Of one connection, by [source][target].
        group: The ranks as islands (``fabric.jobs`` finds them); flat: one island.
        uplink_bytes_per_second: What all members of an island together can send out.
    """

    latency: tuple[tuple[float, ...], ...]
    bytes_per_second: tuple[tuple[float, ...], ...]
    group: Group
    uplink_bytes_per_second: float = float("inf")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.latency)

    def seconds(self, source: int, target: int, nbytes: float) -> float:
        """Return the time of a message alone on its link."""
        rate = self.bytes_per_second[source][target]
        return self.latency[source][target] + nbytes / rate

    def rates_of(self, rank: int) -> list[float]:
        """Return the rates of ``rank``'s links to the others."""
        row = self.bytes_per_second[rank]
        return [rate for other, rate in enumerate(row) if other != rank]

    def rates_to(self, rank: int) -> list[float]:
        """Return the rates of the others' links to ``rank``."""
        rows = enumerate(self.bytes_per_second)
        return [row[rank] for other, row in rows if other != rank]

    def slowest_rate(self) -> float:
        """Return the lowest rate of any link."""
        return min(rate for rank in range(self.size) for rate in self.rates_of(rank))

    def has_islands(self) -> bool:
        """Return whether there is a slow boundary."""
        return any(not isinstance(child, int) for child in self.group)

    def island(self, rank: int) -> int:
        """Return the number of the outermost island of ``rank``."""
        for number, child in enumerate(self.group):
            if rank in members_of(child):
                return number
        raise ValueError(f"rank {rank} is in no island")


def uniform_links(
    size: int,
    latency: float = LOCAL_LATENCY_SECONDS,
    bytes_per_second: float = LOCAL_BYTES_PER_SECOND,
) -> Links:
    """Return equal links between ``size`` ranks: what is assumed before measuring."""
    return Links(
        latency=((latency,) * size,) * size,
        bytes_per_second=((bytes_per_second,) * size,) * size,
        group=tuple(range(size)),
    )


def subset(links: Links, ranks: Sequence[int]) -> Links:
    """Return what is known of the links between ``ranks``, numbered in their order."""
    number = {rank: i for i, rank in enumerate(ranks)}

    def keep(child: int | Group) -> int | Group | None:
        if isinstance(child, int):
            return number.get(child)
        kept = tuple(c for c in map(keep, child) if c is not None)
        return kept if len(kept) > 1 else (kept[0] if kept else None)

    group = keep(links.group)
    return Links(
        latency=tuple(tuple(links.latency[a][b] for b in ranks) for a in ranks),
        bytes_per_second=tuple(
            tuple(links.bytes_per_second[a][b] for b in ranks) for a in ranks
        ),
        group=group if isinstance(group, tuple) else (0,),
        uplink_bytes_per_second=links.uplink_bytes_per_second,
    )


def quantised(value: float) -> float:
    """Return ``value`` (> 0) rounded to a step of 10 %: noise makes no new choice."""
    return float(STEP ** round(math.log(value) / math.log(STEP)))


def ring_order(links: Links, nbytes: float) -> tuple[int, ...]:
    """Return the ranks in the ring order whose slowest link is fastest.

    Islands stay together, so that a ring leaves each only once; exchanges of two
    members then improve the slowest link, and after that the sum.
    """
    order = list(members_of(links.group))
    if len(order) <= 3 or len(order) > MAX_IMPROVED:
        return tuple(order)
    best = _ring_cost(links, order, nbytes)
    improved = True
    while improved:
        improved = False
        for i in range(1, len(order) - 1):
            for j in range(i + 1, len(order)):
                tried = [*order[:i], *reversed(order[i : j + 1]), *order[j + 1 :]]
                cost = _ring_cost(links, tried, nbytes)
                if cost < best:
                    order, best, improved = tried, cost, True
    return tuple(order)


def part_sizes(links: Links, total: int) -> tuple[int, ...]:
    """Return how many elements each rank should own in direct exchanges.

    A rank with a part p of N elements moves about N + (n - 2) p each way, so ranks are
    done together when p_i = (T * rate_i - N) / (n - 2), and none where that is below
    zero: T is found by leaving those out. Rounded to sum to ``total``.
    """
    count = links.size
    rates = [min(links.rates_of(i), default=1.0) for i in range(count)]
    if count < 3:
        return _rounded([1.0] * count, total)
    sharing = sorted(range(count), key=lambda i: -rates[i])
    while True:
        rate = sum(rates[i] for i in sharing)
        # sum over sharing of (T * rate_i - 1) / (n - 2) = 1
        time = (count - 2 + len(sharing)) / rate
        slowest = sharing[-1]
        if time * rates[slowest] >= 1 or len(sharing) == 1:
            break
        sharing.pop()
    shares = [0.0] * count
    for i in sharing:
        shares[i] = max(0.0, time * rates[i] - 1)
    return _rounded(shares, total)


def _ring_cost(
    links: Links, order: Sequence[int], nbytes: float
) -> tuple[float, float]:
    times = [
        links.seconds(a, b, nbytes)
        for a, b in zip(order, [*order[1:], order[0]], strict=True)
    ]
    return round(max(times), 9), round(sum(times), 9)


def _rounded(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Return integers in proportion to ``shares`` that sum to ``total``."""
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    sizes = [int(value) for value in exact]
    rest = total - sum(sizes)
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i] - exact[i], i))
    for i in order[:rest]:
        sizes[i] += 1
    return tuple(sizes)
