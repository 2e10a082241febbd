"""Strided copies and strided extents against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.boxes import Box, strides_of, tiling_fault, whole
from checkpoints.cuts import Cut
from checkpoints.formats.extent_source import (
    SMALL_SPAN_BYTES,
    Extent,
    ExtentSource,
    StoredTensor,
    dense_parts,
)
from checkpoints.strided import Grid, copy_strided

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(SHAPES, st.sampled_from([1, 2, 4, 8]), st.data())
def test_copies_any_permutation(shape, item, data):
    order = data.draw(st.permutations(range(len(shape))))
    count = math.prod(shape)
    array = np.arange(count, dtype=f"<u{item}").reshape(shape)
    view = array.transpose(order)
    out = bytearray(count * item)
    strides = [stride // item for stride in view.strides]
    into = Grid(0, strides_of(view.shape))
    copy_strided(
        memoryview(array.tobytes()),
        Grid(0, strides),
        memoryview(out),
        into,
        view.shape,
        item,
    )
    assert out == view.tobytes()


@pytest.mark.slow
def test_a_large_transposed_extent_is_read_in_long_runs(tmp_path, monkeypatch):
    stored = np.arange(600 * 700, dtype="<u4").reshape(600, 700)
    (tmp_path / "f").write_bytes(stored.tobytes())
    extent = Extent(whole((700, 600)), "f", 0, (1, 700))
    tensor = StoredTensor("U32", (700, 600), (extent,))
    reads = []
    with ExtentSource("test", tmp_path, tmp_path, {"model/w": tensor}) as source:
        real = source._read

        def counting(file, begin, out):
            reads.append(len(out))
            real(file, begin, out)

        monkeypatch.setattr(source, "_read", counting)
        found = b"".join(map(bytes, source.windows("model/w", 1 << 20)))
    assert found == stored.T.tobytes()
    # an element at a time would be 420,000 reads
    assert len(reads) < 100
    assert sum(reads) < 40 * len(found)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.data())
def test_dense_parts_tile(shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    factor = data.draw(st.sampled_from([1, 1000]))
    steps = strides_of([shape[axis] for axis in order])
    strides = [0] * len(shape)
    for axis, step in zip(order, steps, strict=True):
        strides[axis] = step * factor
    extent = Extent(whole(shape), "f", 0, tuple(strides))
    parts = list(dense_parts(whole(shape), extent, 4))
    assert tiling_fault(shape, (box for box, _ in parts)) is None
    for box, first in parts:
        assert first == sum(a * b for a, b in zip(box.offsets, strides, strict=True))
        span = 1 + sum(
            (n - 1) * stride for n, stride in zip(box.sizes, strides, strict=True)
        )
        assert span * 4 <= max(SMALL_SPAN_BYTES, 8 * box.volume)


@given(SHAPES, st.integers(1, 5), st.sampled_from(["fsdp", "tp"]))
def test_shares_of_ranks_tile(shape, world, layout):
    cut = Cut(layout, world, (("model/w*", 1),))
    shares = cut.shares("model/w", shape)
    assert all(0 <= rank < world for rank, _ in shares)
    if 0 not in shape:
        assert tiling_fault(shape, (box for _, box in shares)) is None


def test_tensor_parallel_rows_and_columns():
    cut = Cut("tp", 2, (("*.o_proj.weight", 1), ("*.q_proj.weight", 0)))
    assert cut.shares("model/a.o_proj.weight", (4, 6))[1] == (1, Box((0, 3), (4, 3)))
    assert cut.shares("model/a.q_proj.weight", (4, 6))[1] == (1, Box((2, 0), (2, 6)))
    assert cut.shares("model/a.q_proj.weight", (5, 6)) == [(0, whole((5, 6)))]
    assert cut.shares("model/norm", (4,)) == [(0, whole((4,)))]
