"""`.pt` files: what torch.save writes is read, what we write torch.load loads."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.formats import torch_file
from checkpoints.formats.pickle_values import DTYPES, TORCH_NAMES
from checkpoints.formats.sink import Bundle, OutTensor, SinkOptions
from checkpoints.formats.source import Source
from checkpoints.formats.torch_zip_writer import NewArchive, NewEntry
from checkpoints.hashed_file import Buffer
from fabric.core.errors import ConfigError, IntegrityError


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    high = 2 if name == "bool" else 256
    item = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(
        0, high, (count * item,), dtype=torch.uint8, generator=generator
    )
    return data.view(dtype).reshape(shape)


def read_all(source: Source) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            source.entry(name).dtype,
            tuple(source.entry(name).shape),
            b"".join(bytes(window) for window in source.windows(name, 1 << 16)),
        )
        for name in source.names()
    }


def expected(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    names = {f"torch.{name}": ours for name, ours in DTYPES.items()}
    return {
        name: (names[str(tensor.dtype)], tuple(tensor.shape), raw(tensor))
        for name, tensor in tensors.items()
    }


def opened(path: Path) -> Source:
    assert torch_file.sniff(path)
    return torch_file.open_source(path)


def bundle_of(source: Source) -> Bundle:
    def out(name: str) -> OutTensor:
        entry = source.entry(name)
        read = lambda: source.windows(name, 40)  # noqa: E731
        return OutTensor(name, entry.dtype, tuple(entry.shape), read)

    names = [name for name in source.names() if name not in source.aliases]
    return Bundle({name: out(name) for name in names}, source.aliases, source.state)


def written(bundle: Bundle, path: Path) -> None:
    plan = torch_file.SINK.plan(bundle, SinkOptions())
    (file,) = plan.files
    assert plan.single_file
    with path.open("wb") as target:
        for chunk in file.chunks():
            target.write(chunk)
    assert path.stat().st_size == file.size_bytes


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


STATES = st.lists(
    st.tuples(
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@given(STATES, st.integers(0, 9))
def test_state_dicts_survive_both_ways(tmp_path_factory, shapes, seed) -> None:
    base = tmp_path_factory.mktemp("pt")
    state = {
        f"layer.{at}.weight": random_tensor(dtype, shape, seed + at)
        for at, (dtype, shape) in enumerate(shapes)
    }
    torch.save(state, base / "a.pt")
    with opened(base / "a.pt") as source:
        assert source.ignored == ()
        model = {f"model/{name}": tensor for name, tensor in state.items()}
        assert read_all(source) == expected(model)
        written(bundle_of(source), base / "b.pt")
    assert same(torch.load(base / "b.pt", weights_only=True), state)
    assert same(torch.load(base / "b.pt", weights_only=True, mmap=True), state)
    with zipfile.ZipFile(base / "b.pt") as archive:
        assert archive.testzip() is None  # the checksums are right
    with opened(base / "b.pt") as source:
        assert read_all(source) == expected(model)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.slow
def test_training_state_gets_canonical_names_and_comes_back(tmp_path) -> None:
    model, optimizer = trained()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "rng_state": torch.get_rng_state(),
        "epoch": 3,
        "best": 0.25,
    }
    torch.save(state, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as source:
        names = source.names()
        assert "model/0.weight" in names
        assert "model/1.num_batches_tracked" in names
        assert "optimizer/exp_avg/0.weight" in names
        assert "optimizer/step/2.bias" in names
        assert "rng/rng_state" in names
        assert source.state["epoch"] == 3
        assert source.state["best"] == 0.25
        assert source.state["lr_scheduler"]["T_max"] == 10
        (group,) = source.state["optimizer"]["param_groups"]
        assert group["lr"] == 0.01
        assert group["param_names"][0] == "0.weight"
        assert [each.name for each in source.ignored] == ["_metadata"]
        written(bundle_of(source), tmp_path / "b.pt")
        before = read_all(source)
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    fresh, _ = trained()
    fresh.load_state_dict(loaded["model"])
    assert same(dict(fresh.state_dict()), dict(state["model"]))
    assert torch.equal(loaded["rng"]["rng_state"], state["rng_state"])
    by_name = loaded["optimizer"]["state"]
    for number, name in enumerate(group["param_names"]):
        assert same(by_name[name], optimizer.state_dict()["state"][number])
    with opened(tmp_path / "b.pt") as source:
        assert read_all(source) == before


@pytest.mark.slow
def test_parameters_without_names_keep_their_numbers(tmp_path) -> None:
    model, _ = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as source:
        assert "optimizer/momentum_buffer/0" in source.names()
        (note,) = source.ignored
        assert note.name == "optimizer.state"
        assert "numbers" in note.reason
        written(bundle_of(source), tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    optimizer.load_state_dict(loaded["optimizer"])
    wanted = torch.load(tmp_path / "a.pt")["optimizer"]["state"]
    assert same(optimizer.state_dict()["state"], wanted)


def test_tied_tensors_stay_tied(tmp_path) -> None:
    shared = torch.randn(4, 3)
    state = {"a": shared, "b": shared, "c": shared[1:], "d": shared.T}
    torch.save(state, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as source:
        assert source.aliases == {"model/b": "model/a"}
        wanted = {f"model/{name}": tensor for name, tensor in state.items()}
        assert read_all(source) == expected(wanted)
        written(bundle_of(source), tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert same(loaded, state)


def test_nested_lists_and_odd_roots(tmp_path) -> None:
    torch.save([torch.ones(2), {"x": torch.zeros(1), "n": [1, 2]}], tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as source:
        assert source.names() == ["model/0", "model/1.x"]
        assert source.state == {"1": {"n": [1, 2]}}
    torch.save(torch.ones(2), tmp_path / "b.pt")
    with opened(tmp_path / "b.pt") as source:
        assert source.names() == ["model/tensor"]
    torch.save({"app": {"model": {"w": torch.ones(2)}, "step": 5}}, tmp_path / "c.pt")
    with opened(tmp_path / "c.pt") as source:
        assert source.names() == ["model/w"]
        assert source.state == {"step": 5}
    torch.save({"model.embed": torch.ones(2), "head": torch.ones(1)}, tmp_path / "d.pt")
    with opened(tmp_path / "d.pt") as source:
        assert source.names() == ["model/head", "model/model.embed"]


def test_what_is_not_carried_is_told(tmp_path) -> None:
    state = {
        "model": {"w": torch.ones(2)},
        "best": float("inf"),
        "blob": b"\0",
        "seen": {1, 2},
        "big": 1 << 70,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
    }
    torch.save(state, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as source:
        assert {each.name for each in source.ignored} == {"best", "blob", "seen", "big"}
        assert all(each.reason for each in source.ignored)
        assert source.state == {
            "device": "cpu",
            "dtype": "torch.bfloat16",
            "size": [2, 3],
        }


class Danger:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def refusal(path: Path) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        torch_file.open_source(path)
    return caught.value


def test_code_is_refused_and_not_run(tmp_path) -> None:
    victim = tmp_path / "pwned"
    torch.save({"w": torch.ones(2), "x": Danger(victim)}, tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt")
    assert error.code == "E_PICKLE"
    assert "mkdir" in error.reason
    assert "safetensors" in error.next_step
    assert not victim.exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "b.pt").reason


def test_two_tensors_of_one_name_are_refused(tmp_path) -> None:
    state = {"model": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}}
    torch.save(state, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt").code == "E_NAME"
    torch.save({"model": {"a\nb": torch.ones(1)}}, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt").code == "E_NAME"
    torch.save({"model": {"a" * 600: torch.ones(1)}}, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt").code == "E_NAME"


def test_old_files_and_other_files(tmp_path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch_file.sniff(path)
    error = refusal(path)
    assert error.code == "E_ARCHIVE"
    assert "torch.save it again" in error.next_step
    (tmp_path / "text.pt").write_text("hello")
    assert not torch_file.sniff(tmp_path / "text.pt")
    assert not torch_file.sniff(tmp_path)


def test_state_and_tensors_must_not_meet() -> None:
    tensor = OutTensor("model/a", "F32", (1,), lambda: [b"\0" * 4])
    bundle = Bundle({"model/a": tensor}, {}, {"model": {"a": 1}})
    with pytest.raises(ConfigError):
        torch_file.SINK.plan(bundle, SinkOptions())


def test_a_source_of_another_size_is_noticed() -> None:
    tensor = OutTensor("model/a", "F32", (2,), lambda: [b"\0" * 4])
    plan = torch_file.SINK.plan(Bundle({"model/a": tensor}, {}, {}), SinkOptions())
    with pytest.raises(ValueError, match="not 8"):
        list(plan.files[0].chunks())


@pytest.mark.slow
def test_archives_above_4_gib_load(tmp_path) -> None:
    """Written as a sparse file; torch maps it and finds the last bytes."""
    large, window = (4 << 30) + 64, memoryview(bytes(64 << 20))

    def zeros() -> Iterator[Buffer]:
        for at in range(0, large, len(window)):
            yield window[: large - at]

    tensors = {
        "model/a": OutTensor("model/a", "U8", (large,), zeros),
        "model/b": OutTensor("model/b", "F32", (2,), lambda: [b"\0\0\x80?" * 2]),
    }
    plan = torch_file.SINK.plan(Bundle(tensors, {}, {}), SinkOptions())
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        for chunk in plan.files[0].chunks():
            if chunk is window or len(chunk) == len(window):
                file.seek(len(chunk), os.SEEK_CUR)
            else:
                file.write(chunk)
    assert path.stat().st_size == plan.files[0].size_bytes
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["a"].shape == (large,)
    assert loaded["b"].tolist() == [1.0, 1.0]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == large
        assert archive.getinfo("archive/data/1").header_offset > 4 << 30
    with opened(path) as source:
        assert b"".join(map(bytes, source.windows("model/b"))) == b"\0\0\x80?" * 2


@pytest.mark.slow
def test_more_tensors_than_16_bits_count(tmp_path) -> None:
    entries = [NewEntry(str(at), 0, lambda: ()) for at in range(70_000)]
    archive = NewArchive({"n": len(entries)}, entries)
    (tmp_path / "a.pt").write_bytes(b"".join(map(bytes, archive.chunks())))
    with zipfile.ZipFile(tmp_path / "a.pt") as read:
        assert len(read.namelist()) == len(entries) + 5
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"n": len(entries)}


def test_every_type_has_a_name_in_torch() -> None:
    for name in TORCH_NAMES.values():
        assert isinstance(getattr(torch, name), torch.dtype)
    file = io.BytesIO()
    torch.save({}, file)
    assert zipfile.ZipFile(file).read("archive/version") == b"3\n"


def test_a_flipped_byte_is_caught_and_named(tmp_path) -> None:
    """torch writes checksums and does not look at them."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(300_000), "b": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    assert not torch.equal(torch.load(path)["a"], torch.ones(300_000))
    with opened(path) as source:
        assert b"".join(map(bytes, source.windows("model/b")))
        with pytest.raises(IntegrityError) as caught:
            source.read_box("model/a", (0,), (1,), bytearray(4))
    assert caught.value.code == "E_CHECKSUM"
    assert "a.pt" in caught.value.reason


def test_archives_without_checksums_are_read(tmp_path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with opened(tmp_path / "a.pt") as source:
        assert b"".join(map(bytes, source.windows("model/a"))) == b"\0\0\x80?" * 3
