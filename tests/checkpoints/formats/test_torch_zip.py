"""Archives of the real torch.save are read bit by bit; anything else is refused."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.formats.extent_source import ExtentSource
from checkpoints.formats.pickle_values import DTYPES, TensorRef
from checkpoints.formats.torch_zip import Archive, Span, read_archive, read_span
from fabric.core.errors import IntegrityError

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def elements(base: Path, archive: Archive, tensor: object) -> bytes:
    assert isinstance(tensor, TensorRef)
    source = ExtentSource("test", base, base, {"t": archive.stored(tensor)})
    with source:
        return b"".join(bytes(window) for window in source.windows("t", 24))


def refusal(path: Path, code: str = "E_ARCHIVE") -> str:
    with pytest.raises(IntegrityError) as caught:
        read_archive(path.parent, path.name)
    assert caught.value.code == code
    assert caught.value.next_step
    return caught.value.reason


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any type, and a view of it: permuted, sliced, expanded."""
    dtype = getattr(torch, draw(st.sampled_from(sorted(DTYPES))))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(count)
    item = torch.empty(0, dtype=dtype).element_size()
    size = int(torch.tensor(shape).prod()) * item if shape else item
    data = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=generator)
    tensor = data.view(dtype).reshape(shape)
    if shape:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        step = draw(st.integers(1, 3))
        tensor = tensor[::step]
        if draw(st.booleans()) and 1 in tensor.shape:
            tensor = tensor.expand([3 if n == 1 else n for n in tensor.shape])
    return tensor


@pytest.mark.slow
@given(st.lists(views(), max_size=4), st.integers(0, 200))
def test_any_view_of_any_type_at_any_place(tmp_path_factory, tensors, before) -> None:
    base = tmp_path_factory.mktemp("zip")
    file = io.BytesIO()
    torch.save(tensors, file)
    data = file.getvalue()
    (base / "f").write_bytes(b"x" * before + data + b"y" * 50)
    with (base / "f").open("rb") as opened:
        archive = read_span(Span(opened.fileno(), "f", before, len(data)))
    assert isinstance(archive.value, list)
    for tensor, found in zip(tensors, archive.value, strict=True):
        assert found.shape == tuple(tensor.shape)
        assert elements(base, archive, found) == raw(tensor)


def test_tied_tensors_share_a_storage(tmp_path) -> None:
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared[2:]}, tmp_path / "f.pt")
    value = read_archive(tmp_path, "f.pt").value
    assert isinstance(value, dict)
    assert value["a"] == value["b"]
    assert value["a"].storage == value["c"].storage


@pytest.mark.slow
def test_more_entries_than_16_bits_count(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as archive:
        archive.writestr("f/data.pkl", b"\x80\x02N.")
        for number in range(70_000 if FACTOR > 1 else 66_000):
            archive.writestr(f"f/data/{number}", b"")
    assert len(read_archive(tmp_path, "f.pt").storages) >= 66_000


def test_sizes_above_32_bits(tmp_path) -> None:
    """A sparse file: 5 GiB of zeros that the disk does not hold."""
    path = tmp_path / "f.pt"
    begin = _wide_archive(path, 5 << 30)
    archive = read_archive(tmp_path, "f.pt")
    assert archive.storages == {"0": (begin, 5 << 30)}


def _wide_archive(path: Path, size: int) -> int:
    name, program = b"f/data/0", b"\x80\x02N."
    with path.open("wb") as file:
        places = []
        for entry, length in ((b"f/data.pkl", len(program)), (name, size)):
            places.append((entry, file.tell(), length))
            file.write(
                struct.pack(
                    "<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0, 0, len(entry), 0
                )
                + entry
            )
            begin = file.tell()
            if entry == name:
                file.seek(length, 1)
            else:
                file.write(program)
        directory = file.tell()
        for entry, local, length in places:
            extra = struct.pack("<2H3Q", 1, 24, length, length, local)
            file.write(
                struct.pack(
                    "<4s6H3I5H2I",
                    b"PK\1\2",
                    *(45, 45, 0, 0, 0, 0),
                    *(0, 0xFFFFFFFF, 0xFFFFFFFF),
                    *(len(entry), len(extra), 0, 0, 0),
                    *(0, 0xFFFFFFFF),
                )
                + entry
                + extra
            )
        end = file.tell()
        file.write(
            struct.pack(
                "<4sQ2H2I4Q",
                b"PK\6\6",
                *(44, 45, 45, 0, 0),
                *(2, 2, end - directory, directory),
            )
            + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
            + struct.pack(
                "<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, end - directory, 0xFFFFFFFF, 0
            )
        )
    return begin


def test_what_is_no_archive_is_refused(tmp_path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(path)
    path.write_bytes(b"")
    refusal(path)
    path.write_bytes(b"PK\x03\x04 and no more")
    refusal(path)
    path.write_text("GIF89a" * 100)
    refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", b"\x80\x02N.")
        archive.writestr("f/constants.pkl", b"\x80\x02N.")
    assert "TorchScript" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/other", b"\x80\x02N.")
    assert "data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", b"\x80\x02N.")
        archive.writestr("f/byteorder", b"big")
    assert "big" in refusal(path)
    refusal(tmp_path / "gone", "E_MISSING_FILE")


def test_compressed_entries_are_refused(tmp_path) -> None:
    """A bomb: a thousand times larger once it is unpacked."""
    path = tmp_path / "f.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f/data.pkl", b"\x80\x02" + b"N0" * 1_000_000 + b"N.")
    assert "compressed" in refusal(path)


def test_entries_on_top_of_each_other_are_refused(tmp_path) -> None:
    """Another bomb: every entry is the same bytes; and one that is the directory."""
    path = tmp_path / "f.pt"
    torch.save([torch.ones(50), torch.zeros(50)], path)
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"f/data/{key}") for key in "01")
    data = path.read_bytes()
    at = data.rindex(b"f/data/1") - 4
    place = struct.pack("<I", second.header_offset)
    assert data[at : at + 4] == place
    path.write_bytes(
        data[:at] + struct.pack("<I", first.header_offset) + data[at + 4 :]
    )
    assert "another name" in refusal(path)
    twice = bytearray(data)
    twice[at : at + 4] = struct.pack("<I", first.header_offset)
    twice[at + 11] = twice[data.index(b"f/data/1") + 7] = ord("0")
    path.write_bytes(twice)
    assert "twice" in refusal(path)
    longer = data.replace(struct.pack("<2I", 200, 200), struct.pack("<2I", 600, 600))
    path.write_bytes(longer)
    assert "share bytes" in refusal(path)


def test_lying_sizes_are_refused(tmp_path) -> None:
    path = tmp_path / "f.pt"
    torch.save(torch.ones(50), path)
    data = path.read_bytes()
    sizes = struct.pack("<2I", 200, 200)
    path.write_bytes(data.replace(sizes, struct.pack("<2I", 0xFFFFFFF0, 0xFFFFFFF0)))
    refusal(path)
    path.write_bytes(data.replace(sizes, struct.pack("<2I", 196, 196)))
    archive = read_archive(tmp_path, "f.pt")
    assert isinstance(archive.value, TensorRef)
    with pytest.raises(IntegrityError) as caught:
        archive.stored(archive.value)
    assert caught.value.code == "E_SIZE"


@pytest.mark.slow
def test_truncated_anywhere_is_refused(tmp_path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"a": torch.ones(5), "b": torch.zeros(2, 3)}, path)
    data = path.read_bytes()
    for end in range(0, len(data), 1 if FACTOR > 1 else 7):
        path.write_bytes(data[:end])
        refusal(path)


@pytest.mark.slow
@given(st.data())
def test_damage_gives_a_typed_error_or_a_whole_index(tmp_path_factory, data) -> None:
    base = tmp_path_factory.mktemp("damage")
    file = io.BytesIO()
    torch.save({"a": torch.ones(5), "b": [torch.zeros(2, 3).T]}, file)
    damaged = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(
            st.integers(0, 255)
        )
    (base / "f.pt").write_bytes(damaged)
    try:
        archive = read_archive(base, "f.pt")
    except IntegrityError:
        return
    for begin, size in archive.storages.values():
        assert 0 <= begin <= begin + size <= len(damaged)
