"""The geometry against the obvious way: one element at a time."""

from collections import Counter
from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.boxes import (
    Box,
    flat_boxes,
    inside,
    intersect,
    runs,
    strides_of,
    tiling_fault,
    whole,
)

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def elements(box):
    return set(
        product(*(range(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)))
    )


@st.composite
def box_in(draw, shape, smallest=0):
    offsets, sizes = [], []
    for extent in shape:
        offset = draw(st.integers(0, extent - smallest))
        offsets.append(offset)
        sizes.append(draw(st.integers(smallest, extent - offset)))
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def shape_and_boxes(draw, count):
    shape = draw(shapes)
    return shape, [draw(box_in(shape)) for _ in range(count)]


@st.composite
def tilings(draw):
    """A shape, cut again and again along random dimensions."""
    shape = draw(shapes)
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = draw(st.sampled_from(dims))
        at = draw(st.integers(1, box.sizes[dim] - 1))
        for offset, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += offset
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return shape, draw(st.permutations(boxes))


@given(shape_and_boxes(2))
def test_intersection_is_that_of_the_elements(case):
    _, (a, b) = case
    common = intersect(a, b)
    assert (elements(common) if common else set()) == elements(a) & elements(b)


@given(shape_and_boxes(2))
def test_runs_copy_every_common_element_once(case):
    shape, (a, b) = case
    part = intersect(a, b)
    if part is None:
        return
    flat = list(product(*map(range, shape)))
    stored = [index for index in flat if index in elements(a)]
    wanted = [index for index in flat if index in elements(b)]
    copied = {}
    for run in runs(part, a, b):
        for k in range(run.length):
            assert run.target + k not in copied
            copied[run.target + k] = stored[run.source + k]
    assert copied == {
        place: index for place, index in enumerate(wanted) if index in elements(part)
    }


def test_runs_are_as_long_as_the_layout_allows():
    rows = Box((2, 0), (3, 8))
    assert list(runs(rows, whole((10, 8)), rows)) == [(16, 0, 24)]
    columns = Box((0, 2), (3, 4))
    assert [run.length for run in runs(columns, whole((3, 8)), columns)] == [4, 4, 4]
    scalar = Box((), ())
    assert list(runs(scalar, scalar, scalar)) == [(0, 0, 1)]


@given(st.data(), shapes)
def test_flat_intervals_become_few_boxes_in_order(data, shape):
    total = prod(shape)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    boxes = flat_boxes(shape, begin, end)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    strides = strides_of(shape)
    order = [
        sum(i * s for i, s in zip(index, strides, strict=True))
        for box in boxes
        for index in sorted(elements(box))
    ]
    assert order == list(range(begin, end))


@given(tilings())
def test_a_cut_tensor_is_tiled(case):
    shape, boxes = case
    assert tiling_fault(shape, boxes) is None


@given(tilings(), st.data())
def test_a_missing_or_doubled_box_is_found_where_it_is(case, data):
    shape, boxes = case
    place = data.draw(st.integers(0, len(boxes) - 1))
    fault = tiling_fault(shape, boxes[:place] + boxes[place + 1 :])
    assert fault is not None
    assert fault.covered == 0
    assert fault.at == boxes[place].offsets
    fault = tiling_fault(shape, [*boxes, boxes[place]])
    assert fault is not None
    assert fault.covered == 2
    assert fault.at == boxes[place].offsets


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.lists(box_in(s, 1)))))
def test_tiling_agrees_with_counting_elements(case):
    shape, boxes = case
    counts = Counter(index for box in boxes for index in elements(box))
    wrong = [index for index in elements(whole(shape)) if counts[index] != 1]
    fault = tiling_fault(shape, boxes)
    if not wrong:
        assert fault is None
    else:
        assert fault is not None
        assert fault.at == min(wrong)
        assert fault.covered == counts[fault.at]


def test_a_gap_and_an_overlap_of_one_size_do_not_cancel():
    boxes = [Box((0, 0), (2, 2)), Box((0, 0), (2, 2))]
    assert tiling_fault((2, 4), boxes) is not None


def test_empty_tensors_need_no_box():
    assert tiling_fault((0, 3), []) is None
    assert tiling_fault((), []) is not None
    assert whole(()).volume == 1


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [((0,), (3, 1)), ((-1, 0), (1, 1)), ((0, 0), (5, 1)), ((0, 0), (1, -1))],
)
def test_boxes_outside_are_seen(offsets, sizes):
    assert not inside(Box(offsets, sizes), (4, 4))


def test_intervals_outside_are_refused():
    with pytest.raises(ValueError, match="outside"):
        flat_boxes((2, 2), 1, 5)
