"""Our safetensors reader and writer, with the safetensors library as the oracle."""

import json
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.dtypes import DTYPE_BYTES, tensor_bytes
from checkpoints.formats import single_file
from checkpoints.safetensors_io import (
    MAX_HEADER_BYTES,
    NewTensor,
    layout,
    parse_header_untrusted,
    read_header_untrusted,
)
from fabric.core.errors import IntegrityError

tensors = st.lists(
    st.builds(
        NewTensor,
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 70), max_size=3).map(tuple),
    ),
    unique_by=lambda tensor: tensor.name,
    max_size=6,
)


@given(tensors)
def test_layout_parses_to_itself_aligned_and_without_holes(new):
    prefix, order, header = layout(new, {"format": "pt"})
    size = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in new)
    assert parse_header_untrusted(prefix[8:], size) == header
    assert header.data_begin == len(prefix)
    assert len(prefix) % 64 == 0
    assert sorted(order, key=lambda t: t.name) == sorted(new, key=lambda t: t.name)
    for tensor in new:
        begin, end = header.tensors[tensor.name].data_offsets
        assert begin % DTYPE_BYTES[tensor.dtype] == 0
        if (end - begin) % 64 == 0 and end > begin:
            assert begin % 64 == 0


def entry(begin, end, dtype="U8", shape=None):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps({"a": entry(0, 5)}).encode(),
        json.dumps({"a": entry(0, 3), "b": entry(2, 4)}).encode(),
        json.dumps({"a": entry(0, 1), "b": entry(2, 4)}).encode(),
        json.dumps({"a": entry(0, 4, shape=[3])}).encode(),
        json.dumps({"a": entry(0, 4, dtype="F31")}).encode(),
        json.dumps({"a": entry(0, 4, shape=[2**60, 2**60])}).encode(),
        json.dumps({"a": entry(0, 4, shape=[-4])}).encode(),
        json.dumps({"a": entry(4, 0, shape=[4])}).encode(),
        json.dumps({"a": {**entry(0, 4), "more": 1}}).encode(),
        json.dumps({"a": entry(0, 4), "__metadata__": {"x": 1}}).encode(),
        json.dumps({"a": entry(0, 4)}).encode()[:-1] + b',"a":{}}',
        json.dumps({"a": entry(0, 4)}).encode().replace(b"[4]", b"[" + b"9" * 9999),
        json.dumps({"a": entry(0, 4)}).encode().decode().encode("utf-16"),
    ],
    ids=range(19),
)
def test_lying_headers_are_refused(text):
    with pytest.raises(IntegrityError):
        parse_header_untrusted(text, 4)


@given(st.binary())
def test_arbitrary_headers_give_typed_errors(text):
    with suppress(IntegrityError):
        parse_header_untrusted(text, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"{}x",
    ],
)
def test_short_files_and_oversized_headers_are_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file, pytest.raises(IntegrityError):
        read_header_untrusted(file)


def test_names_must_differ():
    twice = [NewTensor("a", "U8", (1,))] * 2
    with pytest.raises(ValueError, match="one name"):
        layout(twice, {})
    with pytest.raises(ValueError, match="__metadata__"):
        layout([NewTensor("__metadata__", "U8", (1,))], {})


def test_the_library_reads_what_we_write_and_the_reverse(tmp_path):
    library = pytest.importorskip("safetensors")
    data = {"a/b": ("F32", (2, 2), b"0123456789abcdef"), "s": ("U8", (), b"x")}
    new = [NewTensor(name, dtype, shape) for name, (dtype, shape, _) in data.items()]
    prefix, order, _ = layout(new, {"format": "pt"})
    content = prefix + b"".join(data[each.name][2] for each in order)
    (tmp_path / "ours.safetensors").write_bytes(content)
    theirs = dict(library.deserialize((tmp_path / "ours.safetensors").read_bytes()))
    assert theirs.keys() == data.keys()
    for name, (dtype, shape, raw) in data.items():
        found = theirs[name]
        assert (found["dtype"], tuple(found["shape"])) == (dtype, shape)
        assert bytes(found["data"]) == raw


@pytest.mark.slow
def test_we_read_what_the_library_writes(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        "w": torch.arange(6.0).reshape(2, 3),
        "h": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 2),
    }
    library.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    with single_file.open_source(tmp_path / "x.safetensors") as file:
        assert file.names() == sorted(f"model/{name}" for name in tensors)
        found = b"".join(map(bytes, file.windows("model/w")))
        assert found == tensors["w"].numpy().tobytes()
        assert file.entry("model/h").dtype == "BF16"
        assert file.entry("model/none").shape == (0, 2)
