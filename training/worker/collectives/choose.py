"""Which algorithm a collective takes: the one whose estimate on these links is least.

Every rank of a group asks with the same sizes and the same links, and gets the same
schedule. Sizes are compared by their power of two: the candidates of one class are
estimated once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from training.worker.collectives.direct import (
    direct_all_gather,
    direct_reduce_scatter,
    direct_scatter,
)
from training.worker.collectives.estimate import estimate
from training.worker.collectives.halving import (
    doubling_all_gather,
    exchange_all_reduce,
    halving_reduce_scatter,
)
from training.worker.collectives.hierarchy import (
    Gather,
    Group,
    island_all_gather,
    island_broadcast,
    island_reduce_scatter,
)
from training.worker.collectives.links import Links, part_sizes, ring_order
from training.worker.collectives.ring import (
    chain_broadcast,
    ring_all_gather,
    ring_reduce_scatter,
)
from training.worker.collectives.schedule import (
    Schedule,
    Span,
    connections,
    even_sizes,
    finish,
    reversed_paths,
    spans_of,
    transposed,
)
from training.worker.collectives.tree import tree_broadcast, tree_scatter

PIECE_BYTES = 1 << 20
"""What travels, is reduced and is waited for at once."""
CHOICES_KEPT = 512
"""Choices and schedules kept: programs repeat a few sizes for ever."""
MAX_ESTIMATED = 32
"""Ranks up to which schedules are compared; above, only by size."""
SMALL_BYTES = 1 << 16
NOISE = 0.15
"""Measurements and estimates differ by this much for no reason: among candidates that
are so near the best, one is taken by the effort that the estimate does not see."""
FAST_BYTES_PER_SECOND = 3e8
"""Above, processors are the limit and not cards: a round is a wait for another process,
so the fewest rounds are taken (each to each with TLS: 30 % less time than a ring on a
busy machine); below, the fewest connections (flows that share a card disturb each
other)."""

Make = Callable[[int], Schedule]
"""A schedule for so many elements in all."""
_GATHERS: Mapping[str, Gather] = {
    "ring": ring_all_gather,
    "doubling": doubling_all_gather,
    "direct": direct_all_gather,
}
_SCATTERS: Mapping[str, Gather] = {
    "ring": ring_reduce_scatter,
    "doubling": halving_reduce_scatter,
    "direct": direct_reduce_scatter,
}


class Chooser:
    """Schedules of one group's collectives.

    Args:
        links: Measured, or assumed equal.
        force: Name of the one algorithm to take where it applies: for tests.
    """

    def __init__(self, links: Links, force: str = "") -> None:
        self.links = links
        self.force = force
        self.order = ring_order(links, PIECE_BYTES)
        # kept by hand: a cache on a method would keep every chooser alive
        self.all_reduce = lru_cache(CHOICES_KEPT)(self._all_reduce)
        self.all_gather = lru_cache(CHOICES_KEPT)(self._all_gather)
        self.reduce_scatter = lru_cache(CHOICES_KEPT)(self._reduce_scatter)
        self.broadcast = lru_cache(CHOICES_KEPT)(self._broadcast)
        self.scatter = lru_cache(CHOICES_KEPT)(self._scatter)
        self._best = lru_cache(CHOICES_KEPT)(self._best_name)

    def name(self, collective: str, total: int, itemsize: int, root: int = 0) -> str:
        """Return the algorithm that ``collective`` takes for ``total`` elements."""
        candidates = self._candidates(collective, root)
        if self.force in candidates:
            return self.force
        bits = max(1, total * itemsize).bit_length()
        return self._best(collective, bits, root)

    def reduce(
        self, root: int, total: int, itemsize: int, *, mean: bool = False
    ) -> Schedule:
        """Return the reduce to ``root``: the broadcast turned around."""
        turned = transposed(self.broadcast(root, total, itemsize))
        done = finish([root], [[Span(0, total)]]) if mean else ()
        return turned + done

    def gather(self, root: int, sizes: tuple[int, ...], itemsize: int) -> Schedule:
        """Return the gather at ``root``: the scatter turned around."""
        return reversed_paths(self.scatter(root, sizes, itemsize))

    def _all_reduce(self, total: int, itemsize: int, *, mean: bool) -> Schedule:
        name = self.name("all_reduce", total, itemsize)
        return self._make_all_reduce(name, total, mean=mean)

    def _all_gather(self, sizes: tuple[int, ...], itemsize: int) -> Schedule:
        name = self.name("all_gather", sum(sizes), itemsize)
        return self._gathered(name, spans_of(sizes))

    def _reduce_scatter(
        self, sizes: tuple[int, ...], itemsize: int, *, mean: bool
    ) -> Schedule:
        name = self.name("reduce_scatter", sum(sizes), itemsize)
        spans = spans_of(sizes)
        done = finish(range(len(spans)), [[s] for s in spans]) if mean else ()
        return self._scattered(name, spans) + done

    def _broadcast(self, root: int, total: int, itemsize: int) -> Schedule:
        name = self.name("broadcast", total, itemsize, root)
        return self._make_broadcast(name, root, total)

    def _scatter(self, root: int, sizes: tuple[int, ...], itemsize: int) -> Schedule:
        name = self.name("scatter", sum(sizes), itemsize, root)
        return self._make_scatter(name, root, sizes)

    # -- candidates ---------------------------------------------------------------

    def _candidates(self, collective: str, root: int) -> dict[str, Make]:
        even = self._even
        match collective:
            case "all_reduce":
                names = ["exchange", "tree", "ring", "doubling", "direct", "islands"]
                return {n: self._all_reduce_of(n) for n in self._possible(names)}
            case "all_gather" | "reduce_scatter":
                names = self._possible(["ring", "doubling", "direct", "islands"])
                return {n: self._gather_of(n) for n in names}
            case "broadcast":
                names = self._possible(["tree", "chain", "islands"])
                return {n: self._broadcast_of(n, root) for n in names}
            case "scatter":
                return {
                    "tree": lambda total: self._make_scatter("tree", root, even(total)),
                    "direct": lambda total: self._make_scatter(
                        "direct", root, even(total)
                    ),
                }
            case _:
                raise ValueError(f"no collective called {collective}")

    def _best_name(self, collective: str, bits: int, root: int) -> str:
        candidates = self._candidates(collective, root)
        nbytes = 1 << bits
        if self.links.size > MAX_ESTIMATED:
            small = [n for n in ("exchange", "doubling", "tree") if n in candidates]
            large = [n for n in ("islands", "ring", "chain") if n in candidates]
            return ([*small, *large] if nbytes <= SMALL_BYTES else [*large, *small])[0]
        made = {name: make(nbytes) for name, make in candidates.items()}
        times = {
            name: estimate(schedule, self.links, 1, PIECE_BYTES)
            for name, schedule in made.items()
        }
        good = (1 + NOISE) * min(times.values())
        near = [name for name in sorted(made) if times[name] <= good]
        fast = self.links.size > 1 and self.links.slowest_rate() > FAST_BYTES_PER_SECOND
        effort = len if fast else connections
        return min(near, key=lambda name: (effort(made[name]), times[name]))

    def _possible(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if n != "islands" or self.links.has_islands()]

    def _even(self, total: int) -> tuple[int, ...]:
        return even_sizes(total, self.links.size)

    def _all_reduce_of(self, name: str) -> Make:
        return lambda total: self._make_all_reduce(name, total, mean=False)

    def _gather_of(self, name: str) -> Make:
        return lambda total: self._gathered(name, spans_of(self._even(total)))

    def _broadcast_of(self, name: str, root: int) -> Make:
        return lambda total: self._make_broadcast(name, root, total)

    # -- algorithms ---------------------------------------------------------------

    def _gathered(self, name: str, spans: Sequence[Span]) -> Schedule:
        if name == "islands":
            held = {rank: [spans[rank]] for rank in self.order}
            return island_all_gather(self.links.group, held, ring_all_gather)
        return _GATHERS[name](self.order, [[spans[rank]] for rank in self.order])

    def _scattered(self, name: str, spans: Sequence[Span]) -> Schedule:
        if name == "islands":
            held = {rank: [spans[rank]] for rank in self.order}
            return island_reduce_scatter(self.links.group, held, ring_all_gather)
        return _SCATTERS[name](self.order, [[spans[rank]] for rank in self.order])

    def _make_all_reduce(self, name: str, total: int, *, mean: bool) -> Schedule:
        whole = [Span(0, total)]
        if name == "exchange":
            schedule = exchange_all_reduce(self.order, whole[0])
            ends = finish(self.order, [whole] * len(self.order)) if mean else ()
            return schedule + ends
        if name == "tree":
            spread = tree_broadcast(self.order, whole[0])
            ends = finish(self.order[:1], [whole]) if mean else ()
            return (*transposed(spread), *ends, *spread)
        sizes = part_sizes(self.links, total) if name == "direct" else self._even(total)
        spans = spans_of(sizes)
        ends = finish(range(len(spans)), [[s] for s in spans]) if mean else ()
        return (*self._scattered(name, spans), *ends, *self._gathered(name, spans))

    def _make_broadcast(self, name: str, root: int, total: int) -> Schedule:
        at = self.order.index(root)
        members = self.order[at:] + self.order[:at]
        span = Span(0, total)
        if name == "islands":
            return island_broadcast(self.links.group, root, span, chain_broadcast)
        make = tree_broadcast if name == "tree" else chain_broadcast
        return make(members, span)

    def _make_scatter(self, name: str, root: int, sizes: tuple[int, ...]) -> Schedule:
        at = self.order.index(root)
        members = self.order[at:] + self.order[:at]
        spans = spans_of(sizes)
        make = tree_scatter if name == "tree" else direct_scatter
        return make(members, [[spans[rank]] for rank in members])


def flat(size: int) -> Group:
    """Return the group without islands."""
    return tuple(range(size))
