"""Loads: any box from any cut, reading the blocks that hold it and no others."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints.load_plan as load_plan
from checkpoints.boxes import Box, flat_boxes, whole
from checkpoints.load_plan import Want, block_runs, plan_load, read_bytes
from checkpoints.manifest import Chunk, TensorEntry


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Windows of 4 blocks of 16 bytes, so that small tensors span many."""
    monkeypatch.setattr(load_plan, "BLOCK_BYTES", 16)
    monkeypatch.setattr(load_plan, "WINDOW_BYTES", 64)


def index_of(shape, index):
    at = 0
    for extent, here in zip(shape, index, strict=True):
        at = at * extent + here
    return at


@st.composite
def stored(draw):
    """A tensor cut into flat intervals, scattered over two files."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    volume = whole(shape).volume
    item = draw(st.sampled_from([1, 2, 4]))
    data = random.Random(draw(st.integers(0, 99))).randbytes(volume * item)
    files = {"a": bytearray(draw(st.integers(0, 70))), "b": bytearray(3)}
    cuts = sorted(draw(st.sets(st.integers(0, volume), max_size=4)) | {0, volume})
    chunks = []
    for begin, end in pairwise(cuts):
        at = begin
        for box in flat_boxes(shape, begin, end):
            file = draw(st.sampled_from(["a", "b"]))
            start = len(files[file])
            files[file] += data[at * item : (at + box.volume) * item]
            at += box.volume
            chunks.append(Chunk(box.offsets, box.sizes, file, start, len(files[file])))
            files[file] += bytes(draw(st.integers(0, 40)))
    dtype = {1: "U8", 2: "BF16", 4: "F32"}[item]
    return TensorEntry(dtype, shape, tuple(chunks)), files, data, item


@settings(max_examples=200)
@given(stored(), st.data())
def test_any_box_is_filled_from_the_blocks_that_hold_it(held, draw):
    entry, files, data, item = held
    offsets = tuple(draw.draw(st.integers(0, e - 1)) for e in entry.shape)
    sizes = tuple(
        draw.draw(st.integers(1, e - o))
        for e, o in zip(entry.shape, offsets, strict=True)
    )
    box = Box(offsets, sizes)
    windows = plan_load(
        [Want(entry, box, 0), Want(entry, whole(entry.shape), 1)][
            : draw.draw(st.integers(1, 2))
        ]
    )
    out = [bytearray(b"\xaa" * box.volume * item), bytearray(len(data))]
    needed = set()
    for window in windows:
        for runs in window.runs:
            for k in range(runs.repeats):
                at = runs.source + k * runs.source_step
                blocks = range(at // 16, (at + runs.length - 1) // 16 + 1)
                assert all(window.mask >> (b - window.number * 4) & 1 for b in blocks)
                assert all(0 <= b - window.number * 4 < 4 for b in blocks)
                needed |= {(window.file, b) for b in blocks}
                to = runs.at + k * runs.at_step
                out[runs.target][to : to + runs.length] = files[window.file][
                    at : at + runs.length
                ]
    wanted = bytearray()
    for flat in range(box.volume):
        index, rest = [], flat
        for size in reversed(sizes):
            rest, here = divmod(rest, size)
            index.insert(0, here)
        at = index_of(entry.shape, [o + i for o, i in zip(offsets, index, strict=True)])
        wanted += data[at * item : (at + 1) * item]
    assert out[0] == wanted
    read = {
        (w.file, w.number * 4 + b)
        for w in windows
        for first, end in block_runs(w.mask)
        for b in range(first, end)
    }
    assert read == needed
    sizes_of = {name: len(content) for name, content in files.items()}
    assert read_bytes(windows, sizes_of) == sum(
        min(16, sizes_of[file] - b * 16) for file, b in needed
    )


def test_a_slice_of_columns_is_a_few_entries():
    entry = TensorEntry("U8", (1000, 8), (Chunk((0, 0), (1000, 8), "a", 0, 8000),))
    windows = plan_load([Want(entry, Box((0, 0), (1000, 4)), 0)])
    assert sum(len(w.runs) for w in windows) == len(windows) == 125


@given(st.integers(0, 15))
def test_runs_of_blocks(mask):
    blocks = {b for first, end in block_runs(mask) for b in range(first, end)}
    assert blocks == {b for b in range(4) if mask >> b & 1}
