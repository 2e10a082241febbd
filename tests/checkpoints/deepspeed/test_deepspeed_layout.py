"""Where ZeRO's elements lie: any shapes, groups and worlds, and lies about them."""

import os
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.formats import deepspeed_zero
from checkpoints.formats.deepspeed_layout import (
    Flat,
    Fragment,
    flat_tensor,
    group_fragments,
    weights_fragments,
)
from fabric.core.errors import IntegrityError

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))

shapes_of = st.lists(
    st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=5
).map(lambda shapes: {f"p{index}": shape for index, shape in enumerate(shapes)})
worlds = st.integers(1, 7)


def place(fragments, shapes, size):
    """Where each element is, as (rank, place), the slow and obvious way."""
    return {
        name: [
            (rank, start + step)
            for rank, start, numel in fragments[name]
            for step in range(numel)
        ]
        for name in shapes
    }


@settings(max_examples=30 * FACTOR)
@given(shapes_of, worlds)
def test_stage_3_gives_each_rank_a_share_of_each(shapes, world):
    size = sum(-(-prod(shape) // world) for shape in shapes.values())
    found = place(weights_fragments(shapes, size, world), shapes, size)
    begin = 0
    for name, shape in shapes.items():
        share = -(-prod(shape) // world)
        expected = [
            (element // share, begin + element % share)
            for element in range(prod(shape))
        ]
        assert found[name] == expected
        begin += share


@settings(max_examples=30 * FACTOR)
@given(shapes_of, worlds, st.data())
def test_stages_1_and_2_cut_one_line(shapes, world, data):
    gaps = data.draw(
        st.lists(st.integers(0, 3), min_size=len(shapes), max_size=len(shapes))
    )
    gaps[-1] = 0
    total = sum(map(prod, shapes.values())) + sum(gaps)
    size = -(-total // world) + data.draw(st.integers(0, 3))
    lean = [max(0, min(size, total - rank * size)) for rank in range(world)]
    sizes = data.draw(st.sampled_from([lean, [size] * world]))
    found = place(group_fragments(shapes, gaps, sizes), shapes, size)
    at = 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        expected = [divmod(at + element, size) for element in range(prod(shape))]
        assert found[name] == expected
        at += prod(shape) + gap


@settings(max_examples=30 * FACTOR)
@given(shapes_of, st.integers(2, 7), st.data())
def test_parts_that_do_not_add_up_are_refused(shapes, world, data):
    total = sum(map(prod, shapes.values()))
    size = -(-total // world)
    sizes = [max(0, min(size, total - rank * size)) for rank in range(world)]
    rank = data.draw(st.integers(1, world - 1))
    sizes[rank] += data.draw(st.integers(-3, 3).filter(bool))
    allowed = {size, max(0, min(size, total - rank * size))}
    if sizes[rank] < 0 or sizes[rank] in allowed:
        return
    with pytest.raises(IntegrityError) as caught:
        group_fragments(shapes, [0] * len(shapes), sizes)
    assert caught.value.code in ("E_GAP", "E_OVERLAP")
    with pytest.raises(IntegrityError):
        weights_fragments(shapes, total * world + 1, world)


def test_parts_of_two_types_are_refused():
    parts = {0: Flat("F32", "a", 0, 2), 1: Flat("BF16", "b", 0, 2)}
    fragments = [Fragment(0, 0, 2), Fragment(1, 0, 2)]
    with pytest.raises(IntegrityError) as caught:
        flat_tensor("p", (4,), fragments, parts)
    assert caught.value.code == "E_MIXED"
    with pytest.raises(IntegrityError) as caught:
        flat_tensor("p", (3,), [Fragment(0, 0, 3)], {0: parts[0]})
    assert caught.value.code == "E_SIZE"


@pytest.mark.slow
@settings(max_examples=40 * FACTOR, deadline=None)
@given(
    groups=st.lists(shapes_of, min_size=1, max_size=3),
    stage=st.sampled_from([1, 2, 3]),
    world=worlds,
    mapped=st.booleans(),
)
def test_every_element_is_read_where_it_was_put(
    tmp_path_factory, forge, flat, groups, stage, world, mapped
):
    groups = [
        {f"g{index}.{name}": shape for name, shape in group.items()}
        for index, group in enumerate(groups)
    ]
    forged = forge(groups, stage, world, seed=world)
    if not mapped:  # before DeepSpeed 0.7
        for content in forged.ranks.values():
            content["optimizer_state_dict"].pop("param_slice_mappings", None)
    tag = forged.write(tmp_path_factory.mktemp("zero") / "t1")
    with deepspeed_zero.open_source(tag) as source:
        assert set(source.names()) == forged.values.keys()
        for name, (shape, numbers) in forged.values.items():
            assert tuple(source.entry(name).shape) == shape
            assert flat(source, name) == numbers, name
