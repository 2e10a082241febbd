"""Files written from memory: the bytes, the hashes, and a disk that says no."""

import mmap
import random
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.boxes import Box, whole
from checkpoints.hashed_file import HashedFile
from checkpoints.image_file import hash_image, write_image
from checkpoints.part_layout import ChunkPlan, part_record, plan_files
from checkpoints.parts import bytes_source, write_part

MIB = 1 << 20


def image_of(size):
    arena = mmap.mmap(-1, max(4096, -(-size // 4096) * 4096))
    arena[:size] = random.Random(size).randbytes(size)
    view = memoryview(arena)
    return view[:size], view


@pytest.mark.parametrize(
    "size", [0, 1, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB + 77, 20 * MIB]
)
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_and_its_entry(tmp_path, size, direct):
    image, padded = image_of(size)
    # memory that is not padded to pages cannot go past the page cache
    entry = write_image(tmp_path / "a", image, padded if direct else padded[: size + 1])
    assert (tmp_path / "a").read_bytes() == image
    with HashedFile(tmp_path / "b") as file:
        file.write(image)
        assert file.finish() == entry == hash_image(image)


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    image, padded = image_of(4 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OSError, match="large"):
            write_image(tmp_path / "a", image, padded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@st.composite
def chunks(draw):
    out = []
    for number in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        box = whole(shape)
        if shape and shape[0] > 1 and draw(st.booleans()):
            box = Box((1, *box.offsets[1:]), (shape[0] - 1, *shape[1:]))
        out.append(
            ChunkPlan(f"t{number}", draw(st.sampled_from(["U8", "F32"])), shape, box)
        )
    return out


@settings(max_examples=50)
@given(chunks(), st.sets(st.integers(0, 5)), st.integers(1, 200))
def test_planned_files_are_what_a_streaming_writer_writes(
    tmp_path_factory, plans, still, limit
):
    names = {f"t{k}" for k in still}
    layouts = plan_files("w", plans, frozen=names, max_file_bytes=limit)
    assert layouts == plan_files("w", plans[::-1], frozen=names, max_file_bytes=limit)
    base = tmp_path_factory.mktemp("files")
    files, tensors = {}, {}
    for layout in layouts:
        assert len({c.plan.name in names for c in layout.chunks}) == 1
        sources = []
        image = bytearray(layout.size)
        image[: len(layout.prefix)] = layout.prefix
        for plan, begin, end in layout.chunks:
            data = random.Random(plan.name).randbytes(plan.size)
            image[begin:end] = data
            sources.append(
                bytes_source(plan.name, plan.dtype, plan.shape, data, plan.box)
            )
        directory = base / layout.name
        directory.mkdir()
        part = write_part(directory, "w", sources)
        assert (directory / "w-0.safetensors").read_bytes() == image
        files[layout.name] = part.files["w-0.safetensors"]
        tensors |= {
            name: [(c.box, c.begin, c.end) for c in entry.chunks]
            for name, entry in part.tensors.items()
        }
    record = part_record("w", layouts, files)
    assert {
        n: [(c.box, c.begin, c.end) for c in e.chunks]
        for n, e in record.tensors.items()
    } == tensors
