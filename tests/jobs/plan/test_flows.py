"""Bytes of collectives: conserved, in closed form, and the least there can be."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.jobs.plan.flows import gather, ring, scatter, spread
from fabric.jobs.plan.partitions import Partition, partitions
from fabric.jobs.plan.planner import nested
from tests.jobs.plan.grounds import ground, shapes

few = settings(max_examples=25, deadline=None)


def rows(where, flow):
    places = list(where.root.walk())
    keys = [(place.level, place.start, place.stop) for place in places]
    return (
        places,
        dict(zip(keys, flow.into, strict=True)),
        dict(zip(keys, flow.out, strict=True)),
    )


def check_conserved(where, flow):
    """What children take and do not get from each other comes from outside."""
    places, into, out = rows(where, flow)
    moved = [Fraction(0)] * where.root.level
    for place in places:
        key = (place.level, place.start, place.stop)
        assert into[key] >= 0 <= out[key]
        if place.children:
            taken = sum(into[c.level, c.start, c.stop] for c in place.children)
            given_ = sum(out[c.level, c.start, c.stop] for c in place.children)
            assert taken - into[key] == given_ - out[key] >= 0
            moved[place.level - 1] += taken - into[key]
    assert tuple(moved) == flow.moved
    assert into[where.root.level, 0, where.root.size] == 0


@few
@given(shapes, st.data())
def test_bytes_are_conserved_and_each_rank_gets_its_share(shape, data):
    where = ground(shape)
    parts = partitions(where)
    needed, _, held = data.draw(st.sampled_from(list(nested(parts))))
    flow = gather(where, held, needed)
    check_conserved(where, flow)
    places, into, _ = rows(where, flow)
    for place in places:
        start, stop = held.group_of(place.start)
        low, high = needed.group_of(place.start)
        if not place.children:  # of a rank: what it needs less what it has
            share = Fraction(1, high - low) - Fraction(1, stop - start)
            assert into[0, place.start, place.stop] == share
        elif (
            start <= place.start
            and place.stop <= stop
            and (place.start <= low and high <= place.stop)
        ):
            assert into[place.level, place.start, place.stop] == 1 - Fraction(
                place.size, stop - start
            )
    back = scatter(where, held, needed)
    assert (back.into, back.out, back.moved) == (flow.out, flow.into, flow.moved)
    check_conserved(where, back._replace(into=back.out, out=back.into))


@few
@given(shapes, st.data())
def test_going_in_two_steps_brings_each_rank_the_same(shape, data):
    where = ground(shape)
    fine, middle, coarse = data.draw(st.sampled_from(list(nested(partitions(where)))))
    once = gather(where, coarse, fine)
    first, second = gather(where, coarse, middle), gather(where, middle, fine)
    for index, place in enumerate(where.root.walk()):
        both = first.into[index] + second.into[index]
        if not place.children:
            assert once.into[index] == both
        assert once.into[index] <= both  # and never moves more over any link


@few
@given(shapes)
def test_a_flat_ring_crosses_every_boundary_more_often(shape):
    where = ground(shape)
    whole = Partition((where.root.size,))
    single = Partition(tuple(range(1, where.root.size + 1)))
    least, flat = gather(where, whole, single), ring(where, whole)
    for mine, theirs in zip(least.into, flat.into, strict=True):
        assert mine <= theirs
    assert sum(flat.moved) == where.root.size - 1 == sum(least.moved)


@few
@given(shapes)
def test_whole_copies_reach_every_other_island(shape):
    where = ground(shape)
    for islands in partitions(where):
        if "/" in islands.label:
            continue
        flow = spread(where, islands)
        count = len(islands.groups)
        places, into, _ = rows(where, flow)
        for place in places:
            held = sum(
                Fraction(max(0, min(b, place.stop) - max(a, place.start)), b - a)
                for a, b in islands.groups
            )
            expected = held * (count - max(1, held))
            assert into[place.level, place.start, place.stop] == expected
        assert flow.into == flow.out


@pytest.mark.parametrize(
    ("shape", "boundary"),
    [((2, 2), "1/2"), ((3, 1), "1/4"), ((4, 4, 4), "2/3"), ((8,) * 48, "47/48")],
)
def test_the_textbook_case(shape, boundary):
    """All-gather of V over k equal sites: (k - 1) / k of V into each."""
    where = ground(shape)
    whole = Partition((where.root.size,))
    flow = gather(where, whole, Partition(tuple(range(1, where.root.size + 1))))
    assert flow.into[1] == Fraction(boundary)


@few
@given(shapes)
def test_partitions_are_nested_and_uneven_sizes_differ_by_little(shape):
    where = ground(shape)
    parts = partitions(where)
    assert parts[0].degree == "1"
    assert parts[-1].degree == str(where.root.size)
    for part in parts:
        assert part.stops[-1] == where.root.size
        for rank in range(where.root.size):
            start, stop = part.group_of(rank)
            assert start <= rank < stop
    for held, reduced, states in nested(parts):
        assert held.is_within(reduced)
        assert reduced.is_within(states)
    whole = [part for part in parts if "/" not in part.label]
    assert all(fine.is_within(c) for fine, c in itertools.pairwise(whole))
