"""Elements lie where the index says, or the source is refused when it is opened."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.boxes import Box, flat_boxes, strides_of, whole
from checkpoints.formats.checksums import Checksum
from checkpoints.formats.extent_source import Extent, ExtentSource, StoredTensor
from fabric.core.errors import IntegrityError

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def source(base: Path, tensor: StoredTensor) -> ExtentSource:
    return ExtentSource("test", base, base, {"model/w": tensor})


def array_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype="<i4").reshape(shape)


def boxes_in(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    def box(pairs: list[tuple[int, int]]) -> Box:
        ordered = [sorted(pair) for pair in pairs]
        return Box(tuple(a for a, _ in ordered), tuple(b - a for a, b in ordered))

    pairs = [st.tuples(st.integers(0, n), st.integers(0, n)) for n in shape]
    return st.tuples(*pairs).map(list).map(box)


@pytest.mark.slow
@given(SHAPES, st.data())
def test_flat_shards_with_padding_give_every_box(tmp_path_factory, shape, data) -> None:
    """As ZeRO stores them: each rank an interval of the flat tensor, after a gap."""
    base = tmp_path_factory.mktemp("flat")
    array = array_of(shape)
    world = data.draw(st.integers(1, 4))
    share = -(-array.size // world)
    extents = []
    for rank in range(world):
        begin, end = min(rank * share, array.size), min((rank + 1) * share, array.size)
        name = f"rank{rank}"
        (base / name).write_bytes(b"\xff" * 12 + array.reshape(-1)[begin:end].tobytes())
        at = 12
        for box in flat_boxes(shape, begin, end):
            extents.append(Extent(box, name, at))
            at += box.volume * 4
    with source(base, StoredTensor("I32", shape, tuple(extents))) as opened:
        box = data.draw(boxes_in(shape))
        out = bytearray(box.volume * 4)
        opened.read_box("model/w", box.offsets, box.sizes, out)
        cut = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
        assert out == array[cut].tobytes()
        read = b"".join(bytes(window) for window in opened.windows("model/w", 12))
        assert read == array.tobytes()


@pytest.mark.slow
@given(SHAPES.filter(bool), st.data())
def test_strided_extents_give_every_box(tmp_path_factory, shape, data) -> None:
    """As torch stores a transposed, expanded or sliced view."""
    base = tmp_path_factory.mktemp("strided")
    order = data.draw(st.permutations(range(len(shape))))
    stored = array_of(tuple(shape[axis] for axis in order))
    (base / "f").write_bytes(b"\xff" * 8 + stored.tobytes())
    inverse = tuple(order.index(axis) for axis in range(len(shape)))
    view = stored.transpose(inverse)
    strides = tuple(stride // 4 for stride in view.strides)
    extent = Extent(whole(shape), "f", 8, strides)
    with source(base, StoredTensor("I32", shape, (extent,))) as opened:
        box = data.draw(boxes_in(shape))
        out = bytearray(box.volume * 4)
        opened.read_box("model/w", box.offsets, box.sizes, out)
        cut = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
        assert out == view[cut].tobytes()


def refused(base: Path, *extents: Extent, shape: tuple[int, ...] = (4, 2)) -> str:
    with pytest.raises(IntegrityError) as caught:
        source(base, StoredTensor("I32", shape, extents))
    return caught.value.code


def test_what_is_not_whole_is_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(32))
    (tmp_path / "d").mkdir()
    top, bottom = Box((0, 0), (2, 2)), Box((2, 0), (2, 2))
    all_of_it = whole((4, 2))
    assert refused(tmp_path, Extent(top, "f", 0)) == "E_GAP"
    assert refused(tmp_path, Extent(top, "f", 0), Extent(all_of_it, "f", 0)) == (
        "E_OVERLAP"
    )
    assert refused(tmp_path, Extent(top, "f", 0), Extent(bottom, "f", 17)) == "E_SIZE"
    assert refused(tmp_path, Extent(all_of_it, "f", -4)) == "E_SIZE"
    assert refused(tmp_path, Extent(all_of_it, "f", 0, (3, 1))) == "E_SIZE"
    assert refused(tmp_path, Extent(all_of_it, "f", 0, (-2, 1))) == "E_BOUNDS"
    assert refused(tmp_path, Extent(Box((3, 0), (2, 2)), "f", 0)) == "E_BOUNDS"
    assert refused(tmp_path, Extent(all_of_it, "gone", 0)) == "E_MISSING_FILE"
    assert refused(tmp_path, Extent(all_of_it, "d", 0)) == "E_MISSING_FILE"
    for name in ("../f", "/etc/passwd", "a/../../f", "", "f\0"):
        assert refused(tmp_path, Extent(all_of_it, name, 0)) == "E_PATH"


def test_strides_may_overlap(tmp_path: Path) -> None:
    """An expanded tensor: one row seen many times."""
    row = np.arange(3, dtype="<i4")
    (tmp_path / "f").write_bytes(row.tobytes())
    extent = Extent(whole((5, 3)), "f", 0, (0, 1))
    with source(tmp_path, StoredTensor("I32", (5, 3), (extent,))) as opened:
        read = b"".join(bytes(window) for window in opened.windows("model/w"))
    assert read == np.broadcast_to(row, (5, 3)).tobytes()
    assert strides_of((5, 3)) == (3, 1)


@pytest.mark.parametrize("window", [1 << 16, 1 << 20, 8 << 20])
def test_checksums_are_checked_while_windows_pass(tmp_path, window):
    """Ranges: a tensor in two shards, and one that is a part of its range."""
    data = random.Random(4).randbytes(3 << 20)
    ranges = [(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, 1 << 20)]
    known = [
        Checksum("f", at, size, zlib.crc32(data[at : at + size])) for at, size in ranges
    ]
    rows = 1 << 20
    two = StoredTensor(
        "U8",
        (2 * rows,),
        (
            Extent(Box((0,), (rows,)), "f", 0),
            Extent(Box((rows,), (rows,)), "f", rows),
        ),
    )
    part = StoredTensor("U8", (99,), (Extent(Box((0,), (99,)), "f", 2 * rows + 7),))
    tensors = {"model/two": two, "model/part": part}

    def read(name):
        with (
            ExtentSource(
                "test", tmp_path, tmp_path, tensors, checksums=known
            ) as source,
            source.fork() as fork,
        ):
            return b"".join(map(bytes, fork.windows(name, window)))

    (tmp_path / "f").write_bytes(data)
    assert read("model/two") == data[: 2 * rows]
    assert read("model/part") == data[2 * rows + 7 :][:99]
    for at, name in ((5, "two"), (rows - 1, "two"), (2 * rows - 1, "two"),
                     (2 * rows, "part"), (3 * rows - 1, "part")):  # fmt: skip
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        (tmp_path / "f").write_bytes(spoilt)
        with pytest.raises(IntegrityError) as refused:
            read(f"model/{name}")
        assert refused.value.code == "E_CHECKSUM"
