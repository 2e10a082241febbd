"""Load: any box, verified; damage is an error, never wrong data."""

import os
import random
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from checkpoints.boxes import Box, whole
from checkpoints.dtypes import DTYPE_BYTES
from checkpoints.manifest import encode_manifest
from checkpoints.manifest_checks import load_manifest_untrusted
from checkpoints.parts import bytes_source
from checkpoints.reader import CheckpointReader
from checkpoints.verification import verify_checkpoint
from checkpoints.verified_file import CACHED_BLOCKS, BlockCache, BlockMismatch
from checkpoints.writer import CheckpointWriter
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, IntegrityError


@st.composite
def cut_tensors(draw):
    """A tensor, the boxes it is saved in, and one to load."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop()
        dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
        if not dims:
            boxes.append(box)
            break
        dim = draw(st.sampled_from(dims))
        at = draw(st.integers(1, box.sizes[dim] - 1))
        for offset, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += offset
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    offsets = tuple(draw(st.integers(0, extent)) for extent in shape)
    sizes = tuple(
        draw(st.integers(0, extent - offset))
        for extent, offset in zip(shape, offsets, strict=True)
    )
    return draw(st.sampled_from(sorted(DTYPE_BYTES))), shape, boxes, Box(offsets, sizes)


@pytest.mark.slow
@given(st.lists(cut_tensors(), min_size=1, max_size=3), st.integers(1, 3))
def test_any_layout_loads_into_any_box(tmp_path_factory, lab, tensors, writers):
    directory = tmp_path_factory.mktemp("c")
    parts = [[] for _ in range(writers)]
    for number, (dtype, shape, boxes, _) in enumerate(tensors):
        data = lab.content(str(number), dtype, shape)
        for place, box in enumerate(boxes):
            part = lab.cut(data, shape, box, DTYPE_BYTES[dtype])
            parts[place % writers].append(
                bytes_source(str(number), dtype, shape, part, box)
            )
    with CheckpointWriter(directory, 0) as writer:
        records = [writer.write(f"w{k}", part) for k, part in enumerate(parts)]
        writer.commit(records, state={})
    with CheckpointReader(directory) as reader:
        for number, (dtype, shape, _, box) in enumerate(tensors):
            name, item = str(number), DTYPE_BYTES[dtype]
            data = lab.content(name, dtype, shape)
            out = bytearray(box.volume * item)
            reader.read_box(name, box.offsets, box.sizes, out, dtype=dtype)
            assert out == lab.cut(data, shape, box, item)
            assert reader.read_tensor(name) == data
            windows = map(bytes, reader.windows(name, window_bytes=7))
            assert b"".join(windows) == data
    assert verify_checkpoint(directory).findings == []


def test_large_tensors_cross_blocks_and_files(tmp_path, lab):
    lab.save(tmp_path)
    data = lab.content("model/rows", "F32", (512, 1024))
    with CheckpointReader(tmp_path) as reader:
        assert reader.read_tensor("model/rows") == data
        assert reader.read_tensor("model/tied") == data
        assert reader.read_tensor("model/none") == b""
        assert reader.read_tensor("outer/count") == b"\x07"
        assert b"".join(map(bytes, reader.windows("model/rows", 300_000))) == data
        out = bytearray(4 * 300 * 3)
        reader.read_box("model/rows", (100, 1000), (300, 3), out)
        assert out == b"".join(
            data[(row * 1024 + 1000) * 4 :][:12] for row in range(100, 400)
        )
        assert reader.manifest.state["note"] == "\u00e9"


def test_only_needed_files_are_opened(tmp_path, lab):
    lab.save(tmp_path)
    (tmp_path / "step-1/rank1-0.safetensors").unlink()
    with CheckpointReader(tmp_path) as reader:
        reader.read_box("model/rows", (0, 0), (256, 1024), bytearray(1 << 20))
        with pytest.raises(IntegrityError) as missing:
            reader.read_tensor("model/rows")
    assert missing.value.code == "E_MISSING_FILE"


def test_mistakes_of_the_caller(tmp_path, lab):
    lab.save(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        for name, offsets, sizes, dtype, code in [
            ("nothing", (0,), (1,), "", "E_NO_TENSOR"),
            ("model/rows", (0, 0), (1, 1), "BF16", "E_DTYPE"),
            ("model/rows", (0,), (1,), "", "E_BOUNDS"),
            ("model/rows", (512, 0), (1, 1), "", "E_BOUNDS"),
        ]:
            with pytest.raises(ConfigError) as refused:
                reader.read_box(name, offsets, sizes, bytearray(4), dtype=dtype)
            assert refused.value.code == code
        with pytest.raises(ValueError, match="buffer"):
            reader.read_box("model/rows", (0, 0), (1, 1), bytearray(5))


def test_another_root_is_refused(tmp_path, lab):
    root = lab.save(tmp_path)
    with pytest.raises(IntegrityError) as refused:
        CheckpointReader(tmp_path / "step-1", root="0" * 64)
    assert refused.value.code == "E_ROOT"
    (tmp_path / "latest").write_text(f"step-1 {'0' * 64}\n")
    with pytest.raises(IntegrityError):
        CheckpointReader(tmp_path)
    (tmp_path / "latest").write_text(f"../step-1 {root}\n")
    with pytest.raises(IntegrityError) as refused:
        CheckpointReader(tmp_path)
    assert refused.value.code == "E_LATEST"
    with pytest.raises(ConfigError):
        CheckpointReader(tmp_path / "nowhere")


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_named_and_never_loaded(tmp_path, lab, seed):
    root = lab.save(tmp_path)
    rng = random.Random(seed)
    path = rng.choice(sorted((tmp_path / "step-1").glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    # the ends, block borders, the header, and anywhere
    at = [0, len(data) - 1, BLOCK_BYTES - 1, BLOCK_BYTES, 9][seed % 12 % 7 % 5]
    at = at if seed < 7 else rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    report = verify_checkpoint(tmp_path, root=root)
    assert not report.ok
    (finding,) = report.findings
    assert (finding.code, finding.file) == ("E_BLOCK", path.name)
    assert finding.block == at // BLOCK_BYTES
    assert finding.offset == at // BLOCK_BYTES * BLOCK_BYTES
    assert "model/rows" in finding.tensors
    with CheckpointReader(tmp_path) as reader, pytest.raises(BlockMismatch) as caught:
        reader.read_tensor("model/rows")
    assert (caught.value.file, caught.value.block) == (path.name, at // BLOCK_BYTES)


@pytest.mark.parametrize("block", range(7))
def test_every_block_of_a_long_run_is_checked(tmp_path, block):
    """Whole blocks go straight into the destination, four at a time."""
    data = random.Random(1).randbytes(6 << 20)
    with CheckpointWriter(tmp_path, 1) as writer:
        source = bytes_source("a", "U8", (len(data),), data)
        writer.commit([writer.write("w", [source])], state={})
    with CheckpointReader(tmp_path) as reader:
        assert reader.read_tensor("a") == data
    path = tmp_path / "step-1/w-0.safetensors"
    spoiled = bytearray(path.read_bytes())
    spoiled[min(block * BLOCK_BYTES + 77, len(spoiled) - 1)] ^= 1
    path.write_bytes(spoiled)
    with CheckpointReader(tmp_path) as reader, pytest.raises(BlockMismatch) as caught:
        reader.read_tensor("a")
    assert caught.value.block == block


def test_the_cache_of_blocks_is_bounded():
    cache = BlockCache()
    for block in range(CACHED_BLOCKS + 1):
        cache.put("f", block, bytearray(1))
        assert cache.get("f", 0) is not None  # used all the time
    assert cache.get("f", 1) is None  # the one used longest ago
    assert cache.get("f", CACHED_BLOCKS) is not None


def test_flipped_bits_in_a_partly_read_block_are_seen(tmp_path, lab):
    lab.save(tmp_path)
    path = tmp_path / "step-1/rank0-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the scalar at the end: not a byte of what is read below
    path.write_bytes(data)
    with CheckpointReader(tmp_path) as reader:
        reader.read_box("model/rows", (0, 0), (1, 8), bytearray(32))
        with pytest.raises(BlockMismatch):
            reader.read_box("model/bias", (0,), (1,), bytearray(2))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: os.truncate(path, 1000), "E_SIZE"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "E_SIZE"),
        (lambda path: path.unlink(), "E_MISSING_FILE"),
        (lambda path: (path.unlink(), path.mkdir()), "E_SIZE"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "E_SIZE"),
        (
            lambda path: path.write_bytes(
                path.with_name("rank1-0.safetensors").read_bytes()
            ),
            "E_SIZE",
        ),
    ],
    ids=["cut", "longer", "gone", "directory", "fifo", "swapped"],
)
def test_spoiled_files_are_findings_and_typed_errors(tmp_path, lab, spoil, code):
    lab.save(tmp_path)
    spoil(tmp_path / "step-1/rank0-0.safetensors")
    report = verify_checkpoint(tmp_path)
    assert [finding.code for finding in report.findings] == [code]
    assert "model/rows" in report.findings[0].tensors
    with CheckpointReader(tmp_path) as reader, pytest.raises(IntegrityError) as refused:
        reader.read_tensor("model/rows")
    assert refused.value.code == code


def test_a_changed_manifest_is_a_finding(tmp_path, lab):
    lab.save(tmp_path)
    path = tmp_path / "step-1/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":2'))
    report = verify_checkpoint(tmp_path)  # `latest` knows the root
    assert [finding.code for finding in report.findings] == ["E_ROOT"]
    path.write_bytes(path.read_bytes()[:-1])
    report = verify_checkpoint(tmp_path / "step-1")
    assert [finding.code for finding in report.findings] == ["E_MANIFEST"]


def test_strange_files_are_told_but_do_no_harm(tmp_path, lab):
    lab.save(tmp_path)
    (tmp_path / "step-1/note.txt").touch()
    report = verify_checkpoint(tmp_path)
    assert report.ok
    assert [finding.code for finding in report.findings] == ["E_UNLISTED"]
    assert report.blocks == 4
    assert report.checked_bytes == prod((512, 1024, 4)) + sum(
        p.stat().st_size for p in (tmp_path / "step-1").glob("*.safetensors")
    ) - prod((512, 1024, 4))


def tamper(directory, change):
    """Rewrite the manifest, consistent in itself, as a forger would."""
    path = directory / "step-1/manifest.json"
    manifest = load_manifest_untrusted(path.read_bytes())
    path.write_bytes(encode_manifest(change(manifest)))


def test_a_manifest_whose_hashes_disagree_is_found(tmp_path, lab):
    lab.save(tmp_path)
    name = "rank1-0.safetensors"

    def change(manifest):
        entry = structs.replace(manifest.files[name], blake3="0" * 64)
        return structs.replace(manifest, files={**manifest.files, name: entry})

    tamper(tmp_path, change)
    report = verify_checkpoint(tmp_path / "step-1")
    assert [(f.code, f.file) for f in report.findings] == [("E_FILE_HASH", name)]


def test_a_manifest_that_renames_bytes_is_found(tmp_path, lab):
    lab.save(tmp_path)

    def change(manifest):
        tensors = dict(manifest.tensors)
        tensors["model/other"] = tensors.pop("model/bias")
        return structs.replace(manifest, tensors=tensors)

    tamper(tmp_path, change)
    report = verify_checkpoint(tmp_path / "step-1")
    assert [f.code for f in report.findings] == ["E_HEADER"]
    assert report.findings[0].tensors == ("model/other",)
