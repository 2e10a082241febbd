"""Every schedule, on sets: right whatever the ranks, sizes and order of events."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import LocalProtocolError
from training.worker.collectives import direct, halving, hierarchy, ring, tree
from training.worker.collectives.choose import Chooser
from training.worker.collectives.links import (
    Links,
    part_sizes,
    ring_order,
    subset,
    uniform_links,
)
from training.worker.collectives.schedule import (
    Message,
    Span,
    even_sizes,
    reversed_paths,
    spans_of,
    transposed,
)
from training.worker.collectives.symbolic import contribution, run

GATHERS = [
    ring.ring_all_gather,
    halving.doubling_all_gather,
    direct.direct_all_gather,
]


@st.composite
def groups(draw, max_ranks=16):
    """Members in any order, and part sizes that may be zero."""
    count = draw(st.integers(1, max_ranks))
    members = draw(st.permutations(range(count)))
    sizes = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return members, sizes


@st.composite
def islands(draw):
    """Ranks cut into islands of any sizes, perhaps once more inside."""
    count = draw(st.integers(2, 12))
    ranks = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), min_size=1, max_size=4)))
    outer = [ranks[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    nested = []
    for island in outer:
        if len(island) > 2 and draw(st.booleans()):
            nested.append((tuple(island[:2]), tuple(island[2:])))
        else:
            nested.append(tuple(island))
    return tuple(nested), count


def seeds():
    return st.integers(0, 2**32).map(random.Random)


def full_spaces(count, total):
    return [[contribution(r, a, total) for a in range(total)] for r in range(count)]


def everyone(count, total, address):
    return sum(contribution(r, address, total) for r in range(count))


def held_spaces(spans, total):
    """Each rank has its own part and nothing else."""
    return [
        [
            contribution(r, a, total) if span.start <= a < span.stop else 0
            for a in range(total)
        ]
        for r, span in enumerate(spans)
    ]


def owner_of(spans, address):
    return next(r for r, s in enumerate(spans) if s.start <= address < s.stop)


def check_gathered(schedule, spans, total, rng):
    spaces = held_spaces(spans, total)
    run(schedule, spaces, rng)
    wanted = [contribution(owner_of(spans, a), a, total) for a in range(total)]
    assert all(space == wanted for space in spaces)


def check_scattered(schedule, spans, total, rng):
    spaces = full_spaces(len(spans), total)
    run(schedule, spaces, rng)
    for rank, span in enumerate(spans):
        for a in range(span.start, span.stop):
            assert spaces[rank][a] == everyone(len(spans), total, a)


def check_reduced(schedule, count, total, rng, *, mean=False):
    spaces = full_spaces(count, total)
    finished = run(schedule, spaces, rng)
    wanted = [everyone(count, total, a) for a in range(total)]
    assert all(space == wanted for space in spaces)
    if mean and count > 1:
        assert set().union(*finished) == set(range(total))


class TestAlgorithms:
    @pytest.mark.parametrize("gather", GATHERS)
    @given(group=groups(), rng=seeds())
    @settings(max_examples=8)
    def test_all_gather_and_its_turned_reduce_scatter(self, gather, group, rng):
        members, sizes = group
        spans, total = spans_of(sizes), sum(sizes)
        schedule = gather(members, [[spans[m]] for m in members])
        check_gathered(schedule, spans, total, rng)
        check_scattered(transposed(schedule), spans, total, rng)

    @given(group=groups(), total=st.integers(0, 3), rng=seeds())
    @settings(max_examples=13)
    def test_exchange(self, group, total, rng):
        members, _ = group
        schedule = halving.exchange_all_reduce(members, Span(0, total))
        check_reduced(schedule, len(members), total, rng)

    @pytest.mark.parametrize("spread", [tree.tree_broadcast, ring.chain_broadcast])
    @given(group=groups(), total=st.integers(0, 4), rng=seeds())
    @settings(max_examples=8)
    def test_broadcast_and_its_turned_reduce(self, spread, group, total, rng):
        members, _ = group
        schedule = spread(members, Span(0, total))
        mine = [contribution(members[0], a, total) for a in range(total)]
        spaces = [
            mine[:] if r == members[0] else [0] * total for r in range(len(members))
        ]
        run(schedule, spaces, rng)
        assert all(space == mine for space in spaces)
        spaces = full_spaces(len(members), total)
        run(transposed(schedule), spaces, rng)
        wanted = [everyone(len(members), total, a) for a in range(total)]
        assert spaces[members[0]] == wanted

    @pytest.mark.parametrize("spread", [tree.tree_scatter, direct.direct_scatter])
    @given(group=groups(), rng=seeds())
    @settings(max_examples=8)
    def test_scatter_and_its_turned_gather(self, spread, group, rng):
        members, sizes = group
        spans, total = spans_of(sizes), sum(sizes)
        schedule = spread(members, [[spans[m]] for m in members])
        root = members[0]
        spaces = [[0] * total for _ in members]
        spaces[root] = [contribution(root, a, total) for a in range(total)]
        run(schedule, spaces, rng)
        for rank, span in enumerate(spans):
            for a in range(span.start, span.stop):
                assert spaces[rank][a] == contribution(root, a, total)
        spaces = held_spaces(spans, total)
        run(reversed_paths(schedule), spaces, rng)
        wanted = [contribution(owner_of(spans, a), a, total) for a in range(total)]
        assert spaces[root] == wanted

    @given(data=st.data(), count=st.integers(1, 9), rng=seeds())
    @settings(max_examples=13)
    def test_all_to_all(self, data, count, rng):
        row = st.lists(st.integers(0, 3), min_size=count, max_size=count)
        sizes = data.draw(st.lists(row, min_size=count, max_size=count))
        inputs = [sum(r) for r in sizes]
        outputs = [sum(r[j] for r in sizes) for j in range(count)]
        width = max(inputs)
        spaces = [
            [contribution(r, a, width) for a in range(inputs[r])] + [0] * outputs[r]
            for r in range(count)
        ]
        run(direct.all_to_all(sizes), spaces, rng)
        for j in range(count):
            at = inputs[j]
            for i in range(count):
                start = sum(sizes[i][:j])
                for k in range(sizes[i][j]):
                    if i != j:
                        assert spaces[j][at + k] == contribution(i, start + k, width)
                at += sizes[i][j]

    @given(count=st.integers(1, 16), rng=seeds())
    @settings(max_examples=10)
    def test_barrier_hears_of_everyone(self, count, rng):
        schedule = direct.dissemination(range(count))
        slots = len(schedule) + 1
        # the value of an address says who sent it; who had sent before is by induction
        spaces = [[1 << r] + [0] * (slots - 1) for r in range(count)]
        run(schedule, spaces, rng)
        assert all(space[-1] for space in spaces)
        assert 2 ** len(schedule) >= count

    @given(made=islands(), rng=seeds(), data=st.data())
    @settings(max_examples=16)
    def test_islands(self, made, rng, data):
        group, count = made
        row = st.lists(st.integers(0, 3), min_size=count, max_size=count)
        sizes = data.draw(row)
        spans, total = spans_of(sizes), sum(sizes)
        held = {r: [spans[r]] for r in range(count)}
        inside = data.draw(st.sampled_from(GATHERS))
        schedule = hierarchy.island_all_gather(group, held, inside)
        check_gathered(schedule, spans, total, rng)
        check_scattered(transposed(schedule), spans, total, rng)
        homes = [set(hierarchy.members_of(child)) for child in group]
        self.check_crossings(schedule, homes, spans)

    def check_crossings(self, schedule, homes, spans):
        """An island takes each foreign element over its boundary once."""
        for home in homes:
            crossed = sum(
                step.span.size
                for steps in schedule
                for step in steps
                if isinstance(step, Message)
                and step.target in home
                and step.source not in home
            )
            assert crossed == sum(s.size for r, s in enumerate(spans) if r not in home)

    @given(made=islands(), rng=seeds(), data=st.data())
    @settings(max_examples=10)
    def test_broadcast_over_islands(self, made, rng, data):
        group, count = made
        root = data.draw(st.integers(0, count - 1))
        schedule = hierarchy.island_broadcast(
            group, root, Span(0, 2), ring.chain_broadcast
        )
        spaces = [[0, 0] for _ in range(count)]
        spaces[root] = [1, 2]
        run(schedule, spaces, rng)
        assert all(space == [1, 2] for space in spaces)


class TestChooser:
    @pytest.mark.parametrize(
        "force", ["", "exchange", "tree", "ring", "doubling", "direct"]
    )
    @given(count=st.integers(1, 16), total=st.integers(0, 40), rng=seeds())
    @settings(max_examples=5)
    def test_all_reduce(self, force, count, total, rng):
        chooser = Chooser(uniform_links(count), force)
        schedule = chooser.all_reduce(total, 4, mean=True)
        check_reduced(schedule, count, total, rng, mean=True)

    @given(made=islands(), total=st.integers(0, 20), rng=seeds())
    @settings(max_examples=6)
    def test_over_islands(self, made, total, rng):
        group, count = made
        links = two_speeds(group, count)
        for force in ("", "islands"):
            schedule = Chooser(links, force).all_reduce(total, 4, mean=True)
            check_reduced(schedule, count, total, rng, mean=True)

    def test_small_takes_few_latencies_and_large_takes_few_bytes(self):
        chooser = Chooser(uniform_links(8, 1e-3, 1e9))
        assert chooser.name("all_reduce", 4, 4) in {"exchange", "direct"}
        large = chooser.name("all_reduce", 1 << 26, 4)
        assert large not in {"exchange", "tree"}
        assert chooser.name("broadcast", 4, 4) == "tree"
        assert chooser.name("broadcast", 1 << 26, 4) == "chain"

    def test_slow_boundary_takes_islands(self):
        links = two_speeds(((0, 1, 2, 3), (4, 5, 6, 7)), 8)
        assert Chooser(links).name("all_reduce", 1 << 24, 4) == "islands"
        assert (
            Chooser(two_speeds(((0, 1), (2, 3)), 4)).name("all_reduce", 1 << 24, 4)
            == "islands"
        )
        assert Chooser(links).name("all_gather", 1 << 24, 4) == "islands"

    @given(root=st.integers(0, 6), rng=seeds())
    @settings(max_examples=5)
    def test_rooted(self, root, rng):
        chooser = Chooser(uniform_links(7))
        spaces = full_spaces(7, 5)
        run(chooser.reduce(root, 5, 4, mean=True), spaces, rng)
        assert spaces[root] == [everyone(7, 5, a) for a in range(5)]
        spans = spans_of(even_sizes(5, 7))
        spaces = held_spaces(spans, 5)
        run(chooser.gather(root, even_sizes(5, 7), 4), spaces, rng)
        assert all(spaces[root])


class TestLinks:
    def test_ring_goes_around_the_slow_link(self):
        count = 5
        rates = [[1e9] * count for _ in range(count)]
        for a, b in ((0, 1), (1, 2)):
            rates[a][b] = rates[b][a] = 1e6
        links = Links(
            uniform_links(count).latency, tuple(map(tuple, rates)), tuple(range(count))
        )
        order = ring_order(links, 1 << 20)
        pairs = set(zip(order, order[1:] + order[:1], strict=True))
        assert sorted(order) == list(range(count))
        assert not pairs & {(0, 1), (1, 0), (1, 2), (2, 1)}

    @given(
        rates=st.lists(st.floats(1e5, 1e9), min_size=1, max_size=9),
        total=st.integers(0, 1000),
    )
    @settings(max_examples=16)
    def test_slower_members_own_less(self, rates, total):
        count = len(rates)
        table = tuple(tuple(min(a, b) for b in rates) for a in rates)
        links = Links(uniform_links(count).latency, table, tuple(range(count)))
        sizes = part_sizes(links, total)
        assert sum(sizes) == total
        assert min(sizes) >= 0
        slowest, fastest = rates.index(min(rates)), rates.index(max(rates))
        assert sizes[slowest] <= sizes[fastest] + 1

    def test_equal_links_make_equal_parts(self):
        assert part_sizes(uniform_links(4), 10) == (3, 3, 2, 2)

    def test_subset_keeps_islands(self):
        links = two_speeds(((0, 1), (2, 3)), 4)
        assert subset(links, [1, 2, 3]).group == (0, (1, 2))
        assert subset(links, [0, 1]).group == (0, 1)
        assert subset(links, [3, 0]).bytes_per_second[0][1] == 1e7


def two_speeds(group, count):
    homes = [set(hierarchy.members_of(child)) for child in group]

    def rate(a, b):
        return 1e9 if any({a, b} <= home for home in homes) else 1e7

    table = tuple(tuple(rate(a, b) for b in range(count)) for a in range(count))
    return Links(uniform_links(count).latency, table, group, 1e7)


class TestSymbolicFindsMistakes:
    """The oracle itself: planted mistakes are found."""

    def run(self, schedule, spaces):
        with pytest.raises(LocalProtocolError):
            run(schedule, spaces, random.Random(0))

    def test_counted_twice(self):
        twice = Message(0, 1, Span(0, 1), 0, reduce=True)
        self.run(((twice,), (twice,)), [[1], [2]])

    def test_not_there(self):
        self.run(((Message(0, 1, Span(0, 1), 0),),), [[0], [2]])

    def test_waiting_for_each_other(self):
        # both want to overwrite what the other has not yet sent
        both = (Message(0, 1, Span(0, 1), 0), Message(1, 0, Span(0, 1), 0))
        self.run((both,), [[1], [2]])
