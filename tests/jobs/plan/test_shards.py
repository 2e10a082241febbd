"""Shards of every scheme: each parameter once in each group, nested, even."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.jobs.plan.flows import gather
from fabric.jobs.plan.partitions import partitions
from fabric.jobs.plan.planner import nested
from fabric.jobs.plan.shards import shards_of
from tests.jobs.plan.grounds import ground, shapes


def size(boxes):
    return sum(stop - start for start, stop in boxes)


def positions(boxes):
    return {at for start, stop in boxes for at in range(start, stop)}


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 400), st.data())
def test_each_group_holds_everything_once_and_shards_are_nested(shape, numel, data):
    where = ground(shape)
    triple = data.draw(st.sampled_from(list(nested(partitions(where)))))
    shards = shards_of(numel, *triple)
    kinds = ("weights", "gradients", "states")
    for part, kind in zip(triple, kinds, strict=True):
        for start, stop in part.groups:
            boxes = sorted(
                box for shard in shards[start:stop] for box in getattr(shard, kind)
            )
            assert size(boxes) == numel
            assert [0, *(b for _, b in boxes)] == [*(a for a, _ in boxes), numel]
    for shard in shards:
        assert positions(shard.states) <= positions(shard.gradients)
        assert positions(shard.gradients) <= positions(shard.weights)
    spare = len(triple[0].groups)  # earliest deadline first misses by rounding only
    for part, kind in zip(triple[1:], kinds[1:], strict=True):
        for start, stop in part.groups:
            for shard in shards[start:stop]:
                even = numel / (stop - start)
                assert abs(size(getattr(shard, kind)) - even) <= 1 + spare


def test_equal_places_get_equal_whole_boxes():
    where = ground(((2, 2), (2, 2)))
    host, site, whole = (p for p in partitions(where) if p.degree in ("2", "4", "8"))
    shards = shards_of(800, host, site, whole)
    for shard in shards:
        assert [size(b) for b in (shard.weights, shard.gradients, shard.states)] == [
            400,
            200,
            100,
        ]
        assert len(shard.weights) == len(shard.gradients) == len(shard.states) == 1


def test_islands_of_three_and_two_share_states_evenly():
    where = ground((3, 2))
    site, whole = (p for p in partitions(where) if p.degree in ("2-3", "5"))
    shards = shards_of(3000, site, site, whole)
    assert [size(shard.weights) for shard in shards] == [1000] * 3 + [1500] * 2
    assert [size(shard.states) for shard in shards] == [600] * 5


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(2000, 4000), st.data())
def test_the_bytes_of_the_cost_model_are_those_of_real_shards(shape, numel, data):
    """After the step each place takes in what its ranks' weights lack: set by set."""
    where = ground(shape)
    triple = data.draw(st.sampled_from(list(nested(partitions(where)))))
    shards = shards_of(numel, *triple)
    flow = gather(where, triple[2], triple[0])
    for place, into in zip(where.root.walk(), flow.into, strict=True):
        lacking = 0
        for start, stop in triple[2].groups:
            inside = shards[max(start, place.start) : max(start, min(stop, place.stop))]
            need = set().union(*(positions(shard.weights) for shard in inside))
            have = set().union(*(positions(shard.states) for shard in inside))
            assert have <= need
            lacking += len(need - have)
        rounding = place.size * (2 + len(triple[0].groups))
        assert abs(lacking - into * numel) <= rounding
