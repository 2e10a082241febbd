"""Plans: every element is written once, by one who holds it, and evenly."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.boxes import Box, flat_boxes, inside, tiling_fault, whole
from checkpoints.dtypes import tensor_bytes
from checkpoints.placements import Split, chunk_bounds, held_boxes
from checkpoints.save_plan import (
    LOCAL_PLAN_CODEC,
    HeldTensor,
    LocalPlan,
    merge_plans,
    subtract,
)
from fabric.core.errors import ConfigError

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)


def cells(box):
    return set(
        product(
            *(
                range(at, at + size)
                for at, size in zip(box.offsets, box.sizes, strict=True)
            )
        )
    )


@st.composite
def layouts(draw, shape):
    """What each rank of a mesh holds of a tensor: any placements, or flat intervals."""
    if draw(st.booleans()):
        count = draw(st.integers(1, 8))
        volume = whole(shape).volume
        cuts = sorted(
            draw(
                st.lists(st.integers(0, volume), min_size=count - 1, max_size=count - 1)
            )
        )
        edges = [0, *cuts, volume]
        return [flat_boxes(shape, a, b) for a, b in pairwise(edges)]
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    axes = []
    for parts in mesh:
        dim = draw(st.integers(-1, len(shape) - 1))
        axes.append((parts, dim, draw(st.integers(1, 3))))
    ranks = []
    for place in product(*(range(parts) for parts in mesh)):
        splits = [
            Split(dim, parts, index, factor)
            for (parts, dim, factor), index in zip(axes, place, strict=True)
            if dim >= 0
        ]
        ranks.append([held.box for held in held_boxes(shape, splits)])
    return ranks


@st.composite
def plans(draw):
    num_ranks = 0
    tensors = []
    for number in range(draw(st.integers(1, 5))):
        shape = draw(shapes)
        layout = draw(layouts(shape))
        num_ranks = max(num_ranks, len(layout))
        tensors.append(
            (f"t{number}", draw(st.sampled_from(["U8", "BF16", "F32"])), shape, layout)
        )
    local = []
    for rank in range(num_ranks):
        held = [
            HeldTensor(name, dtype, shape, tuple(layout[rank]))
            for name, dtype, shape, layout in tensors
            if rank < len(layout)
        ]
        local.append(LocalPlan(tuple(held), {}))
    return tensors, local


@given(plans())
def test_every_element_is_written_once_by_a_rank_that_holds_it(drawn):
    tensors, local = drawn
    merged = merge_plans(local)
    written = {name: [] for name, *_ in tensors}
    for rank, plan in enumerate(merged.ranks):
        held = {each.name: each.boxes for each in local[rank].tensors}
        for item in plan.items:
            written[item.name].append(item.box)
            assert any(cells(item.box) <= cells(box) for box in held[item.name])
    for name, _, shape, _ in tensors:
        assert tiling_fault(shape, written[name]) is None
        assert (name in merged.empty) == (whole(shape).volume == 0)


@given(plans())
def test_equal_plans_give_equal_assignments_also_over_a_wire(drawn):
    _, local = drawn
    wire = [
        LOCAL_PLAN_CODEC.decode_untrusted(LOCAL_PLAN_CODEC.encode(p)) for p in local
    ]
    assert wire == local
    assert merge_plans(wire) == merge_plans(local)


@given(st.integers(1, 8), st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_replicas_are_spread_by_worst_fit(num_ranks, sizes):
    held = tuple(
        HeldTensor(f"t{k:02}", "U8", (size,), (whole((size,)),))
        for k, size in enumerate(sizes)
    )
    merged = merge_plans([LocalPlan(held, {})] * num_ranks)
    size_of = {each.name: each.shape[0] for each in held}
    loads = [sum(size_of[i.name] for i in plan.items) for plan in merged.ranks]
    assert sum(loads) == sum(sizes)
    # greedy by descending size: the gap is at most the smallest piece of the fullest
    fullest = merged.ranks[loads.index(max(loads))]
    assert max(loads) - min(loads) <= min(size_of[i.name] for i in fullest.items)


def test_what_only_one_rank_holds_counts_before_replicas_are_given_out():
    shared = HeldTensor("shared", "U8", (4,), (whole((4,)),))
    own = HeldTensor("own", "U8", (10,), (whole((10,)),))
    merged = merge_plans([LocalPlan((own, shared), {}), LocalPlan((shared,), {})])
    assert [[i.name for i in plan.items] for plan in merged.ranks] == [
        ["own"],
        ["shared"],
    ]


@given(shapes, st.data())
def test_a_whole_beside_rows_is_cut_apart(shape, data):
    parts = data.draw(layouts(shape))
    local = [LocalPlan((HeldTensor("t", "U8", shape, (whole(shape),)),), {})]
    local += [LocalPlan((HeldTensor("t", "U8", shape, tuple(p)),), {}) for p in parts]
    merged = merge_plans(local)
    boxes = [item.box for plan in merged.ranks for item in plan.items]
    assert tiling_fault(shape, boxes) is None


@given(st.data())
def test_subtraction_leaves_exactly_the_rest(data):
    ndim = data.draw(st.integers(0, 3))
    index = st.tuples(*[st.integers(0, 4)] * ndim)
    size = st.tuples(*[st.integers(1, 4)] * ndim)
    a, b = (Box(data.draw(index), data.draw(size)) for _ in range(2))
    rest = list(subtract(a, b))
    assert len(rest) <= max(1, 2 * ndim)
    assert sum(box.volume for box in rest) == len(set().union(*map(cells, rest), set()))
    assert set().union(*map(cells, rest), set()) == cells(a) - cells(b)


FOUR = whole((4,))


def held(dtype="U8", shape=(4,), boxes=(FOUR,), name="t"):
    return HeldTensor(name, dtype, shape, boxes)


@pytest.mark.parametrize(
    ("local", "code"),
    [
        ([LocalPlan((held(),), {}), LocalPlan((held(dtype="I8"),), {})], "E_PLAN"),
        ([LocalPlan((held(boxes=(Box((0,), (3,)),)),), {})], "E_GAP"),
        (
            [
                LocalPlan((held(),), {"b": "t"}),
                LocalPlan((held(), held(name="b")), {}),
            ],
            "E_TIED",
        ),
        (
            [
                LocalPlan((held(),), {"b": "t"}),
                LocalPlan((held(name="u"),), {"b": "u"}),
            ],
            "E_TIED",
        ),
    ],
)
def test_plans_that_contradict_each_other_are_refused(local, code):
    with pytest.raises(ConfigError) as refused:
        merge_plans(local)
    assert refused.value.code == code


def test_a_rank_with_an_empty_shard_cannot_see_that_weights_are_tied():
    merged = merge_plans(
        [
            LocalPlan((held(),), {"b": "t"}),
            LocalPlan((held(boxes=()), held(name="b", boxes=())), {}),
        ]
    )
    assert merged.aliases == {"b": "t"}
    assert merged.empty == {}


@given(st.integers(0, 20), st.integers(1, 6))
def test_chunks_follow_each_other(length, parts):
    bounds = [chunk_bounds(length, parts, index) for index in range(parts)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(bounds))


@given(shapes, st.data())
def test_local_places_lie_one_after_another(shape, data):
    mesh = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    splits = [
        Split(
            data.draw(st.integers(0, len(shape) - 1)),
            parts,
            data.draw(st.integers(0, parts - 1)),
            data.draw(st.integers(1, 3)),
        )
        for parts in mesh
        if shape
    ]
    held = held_boxes(shape, splits)
    assert all(inside(each.box, shape) for each in held)
    local = [Box(each.local, each.box.sizes) for each in held]
    if local:
        extent = tuple(
            max(box.offsets[d] + box.sizes[d] for box in local)
            for d in range(len(shape))
        )
        assert tiling_fault(extent, local) is None
    assert tensor_bytes("U8", shape) >= sum(box.volume for box in local)
