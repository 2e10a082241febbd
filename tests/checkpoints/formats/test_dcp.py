"""Distributed checkpoints: torch's are read bit by bit, ours torch reads; no probe
that fools torch fools us.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp_torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoints.formats import dcp, torch_file
from checkpoints.formats.pickle_values import DTYPES
from checkpoints.formats.sink import Bundle, OutTensor, SinkOptions
from checkpoints.formats.source import Source
from fabric.core.errors import ConfigError, FabricError, IntegrityError

RANKS = Path(__file__).parent / "dcp_ranks.py"
Content = dict[str, tuple[str, tuple[int, ...], bytes]]


def save(state: Mapping[str, Any], path: Path, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = FileSystemWriter(path, **how)
        dcp_torch.save(dict(state), storage_writer=writer, no_dist=True)
    return path


def read_all(source: Source, window: int = 1 << 16) -> Content:
    return {
        name: (
            source.entry(name).dtype,
            tuple(source.entry(name).shape),
            b"".join(bytes(part) for part in source.windows(name, window)),
        )
        for name in source.names()
    }


def content(path: Path, module: Any = dcp) -> Content:
    assert module.sniff(path)
    with module.open_source(path) as source:
        return read_all(source)


def bundle_of(source: Source) -> Bundle:
    def out(name: str) -> OutTensor:
        entry = source.entry(name)
        read = lambda: source.windows(name, 40)  # noqa: E731
        return OutTensor(name, entry.dtype, tuple(entry.shape), read)

    names = [name for name in source.names() if name not in source.aliases]
    return Bundle({name: out(name) for name in names}, source.aliases, source.state)


def written(bundle: Bundle, path: Path, **options: int) -> Path:
    plan = dcp.SINK.plan(bundle, SinkOptions(**options))
    path.mkdir()
    for file in plan.files:
        data = b"".join(map(bytes, file.chunks()))
        assert len(data) == file.size_bytes
        (path / file.path).write_bytes(data)
    plan.finish(path, {})
    return path


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def loaded(path: Path) -> object:
    """What torch makes of a directory."""
    whole = path.with_suffix(".pt")
    dcp_to_torch_save(path, whole)
    return torch.load(whole, weights_only=True)


def refusal(path: Path) -> FabricError:
    with pytest.raises(FabricError) as caught:
        dcp.open_source(path)
    return caught.value


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    size = count * torch.empty(0, dtype=dtype).element_size()
    high = 2 if name == "bool" else 256
    data = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


SHAPES = st.lists(
    st.tuples(
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@given(SHAPES, st.integers(0, 9))
def test_states_of_every_type_survive_both_ways(tmp_path_factory, shapes, seed) -> None:
    base = tmp_path_factory.mktemp("dcp")
    state = {
        "model": {
            f"layer.{at}": random_tensor(dtype, shape, seed + at)
            for at, (dtype, shape) in enumerate(shapes)
        },
        "step": 3,
    }
    torch.save(state, base / "a.pt")
    assert content(save(state, base / "a")) == content(base / "a.pt", torch_file)
    with dcp.open_source(base / "a") as source:
        assert source.state == {"step": 3}
        assert source.ignored == ()
        written(bundle_of(source), base / "b", max_shard_bytes=1000)
    assert same(loaded(base / "b"), state)
    assert content(base / "b") == content(base / "a.pt", torch_file)


WORLDS = [
    "2-fsdp",
    "3-fsdp-each",
    "4-grid",
    "4-tp-threads",
    "2-adam",
    "3-adam",
    "4-adam-threads",
]


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory) -> Path:
    """What real ranks saved, by world and layout."""
    base = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(RANKS), str(base), *WORLDS, "3-fsdp"]
    subprocess.run(
        command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return base


@pytest.mark.slow
@pytest.mark.parametrize("case", WORLDS)
def test_real_ranks(tmp_path, by_ranks, case) -> None:
    saved, file = by_ranks / case / "saved", by_ranks / case / "whole.pt"
    assert content(saved) == content(file, torch_file)
    with dcp.open_source(saved) as source, torch_file.open_source(file) as whole:
        assert source.state == whole.state
        assert source.ignored == ()
        written(bundle_of(whole), tmp_path / "ours", max_shard_bytes=4000)
    theirs = torch.load(file, weights_only=True)
    mine = loaded(tmp_path / "ours")
    assert isinstance(mine, dict)
    assert same(mine.get("model", mine), dict(theirs["model"]))
    if "adam" in case:
        assert same(mine["optimizer"]["state"], theirs["optimizer"]["state"])
        assert mine["epoch"] == 7
        assert read_all_state(saved)["0.weight"] == {
            "exp_avg",
            "exp_avg_sq",
            "step",
        }


def read_all_state(path: Path) -> dict[str, set[str]]:
    slots: dict[str, set[str]] = {}
    with dcp.open_source(path) as source:
        for name in source.names():
            section, _, rest = name.partition("/")
            if section == "optimizer":
                slot, _, parameter = rest.partition("/")
                slots.setdefault(parameter, set()).add(slot)
    return slots


def test_what_we_write_torch_loads_in_place(tmp_path) -> None:
    """By dcp.load into a state_dict; tied weights are one place in the file."""
    weight = torch.randn(5, 4)
    torch.save(
        {
            "model": {"a.w": weight, "b.w": weight, "s": torch.tensor(2)},
            "optimizer": {
                "state": {"a.w": {"exp_avg": weight + 1, "step": torch.tensor(4.0)}},
                "param_groups": [{"lr": 0.1, "params": ["a.w"], "betas": [0.9, 0.95]}],
            },
            "empty": {},
            "names": ["x", "y"],
        },
        tmp_path / "a.pt",
    )
    with torch_file.open_source(tmp_path / "a.pt") as source:
        assert source.aliases == {"model/b.w": "model/a.w"}
        before = read_all(source)
        written(bundle_of(source), tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.distcp"))) == 1
    state = {
        "model": {
            "a.w": torch.zeros(5, 4),
            "b.w": torch.zeros(5, 4),
            "s": torch.tensor(0),
        },
        "optimizer": {
            "state": {"a.w": {"exp_avg": torch.zeros(5, 4), "step": torch.tensor(0.0)}},
            "param_groups": [{"lr": 0.0, "params": ["a.w"]}],
        },
        "names": [],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_torch.load(state, checkpoint_id=tmp_path / "b", no_dist=True)
    assert torch.equal(state["model"]["b.w"], weight)
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert state["names"] == ["x", "y"]
    with dcp.open_source(tmp_path / "b") as source:
        assert source.aliases == {"model/b.w": "model/a.w"}
        assert read_all(source) == before
        assert source.state["empty"] == {}


def test_states_without_paths_are_understood_by_their_names(tmp_path) -> None:
    flat = {
        "model.a.w": torch.ones(2),
        "optimizer.state.a.w.exp_avg": torch.ones(2),
        "optimizer.param_groups.a.w.lr": 0.5,
    }
    save(flat, tmp_path / "a")
    change(tmp_path / "a", lambda metadata: setattr(metadata, "planner_data", None))
    with dcp.open_source(tmp_path / "a") as source:
        assert source.names() == ["model/a.w", "optimizer/exp_avg/a.w"]
        assert source.state == {"optimizer": {"param_groups": {"a.w": {"lr": 0.5}}}}
    save({"model.a.w": torch.ones(2), "head": torch.ones(1)}, tmp_path / "b")
    change(tmp_path / "b", lambda metadata: setattr(metadata, "planner_data", None))
    with dcp.open_source(tmp_path / "b") as source:
        assert source.names() == ["model/head", "model/model.a.w"]


def test_objects_become_state_or_are_told(tmp_path) -> None:
    state = {
        "w": torch.ones(2),
        "config": {"a": (1, 2), "b": None},
        "inner": [{"t": torch.arange(3), "n": 1}],
        "odd": pickle.PickleBuffer,
        "best": float("nan"),
    }
    save(state, tmp_path / "a")
    with dcp.open_source(tmp_path / "a") as source:
        assert source.names() == ["model/inner.0.t", "model/w"]
        assert source.state == {"config": {"a": [1, 2], "b": None}, "inner": [{"n": 1}]}
        told = {each.name: each.reason for each in source.ignored}
        assert set(told) == {"odd", "best"}
        assert "PickleBuffer" in told["odd"]


@pytest.mark.slow
def test_safetensors_of_the_same_writer(tmp_path) -> None:
    state = {
        "model": {
            "a": torch.randn(3, 4),
            "b": torch.ones(5, dtype=torch.int64),
            "c": torch.ones(2, 2).to(torch.float8_e4m3fn),
        },
        "n": 5,
    }
    torch.save(state, tmp_path / "a.pt")
    save(state, tmp_path / "a", serialization_format=SerializationFormat.SAFETENSORS)
    assert content(tmp_path / "a") == content(tmp_path / "a.pt", torch_file)
    file = next((tmp_path / "a").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    assert refusal(tmp_path / "a").code == "E_SAFETENSORS"


# The probes of research: what torch executes, or loads wrong without a word


class Danger:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def simple(path: Path, value: float = 1.0, rows: int = 40) -> Path:
    return save({"w": torch.full((rows, 8), value), "b": torch.full((9,), value)}, path)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_hostile_index(tmp_path) -> None:
    victim = tmp_path / "pwned"
    simple(tmp_path / "a")
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Danger(victim)))
    error = refusal(tmp_path / "a")
    assert error.code == "E_PICKLE"
    assert not victim.exists()
    change_to = pickle.dumps({"planner_data": Danger(victim)})
    (tmp_path / "a" / ".metadata").write_bytes(change_to)
    assert refusal(tmp_path / "a").code == "E_PICKLE"
    assert not victim.exists()


def test_hostile_object(tmp_path) -> None:
    victim = tmp_path / "pwned"
    save({"w": torch.ones(3), "extra": Danger(victim)}, tmp_path / "a")
    with dcp.open_source(tmp_path / "a") as source:
        assert source.names() == ["model/w"]
        (told,) = source.ignored
        assert told.name == "extra"
        assert "mkdir" in told.reason
    assert not victim.exists()


def test_a_hostile_object_in_a_tensors_place(tmp_path) -> None:
    victim = tmp_path / "pwned"
    save({"w": torch.ones(3)}, tmp_path / "a")
    file = io.BytesIO()
    torch.save(Danger(victim), file)
    (tmp_path / "a" / "__0_0.distcp").write_bytes(file.getvalue())

    def edit(metadata: Any) -> None:
        (info,) = metadata.storage_data.values()
        info.length = len(file.getvalue())

    change(tmp_path / "a", edit)
    assert refusal(tmp_path / "a").code == "E_PICKLE"
    assert not victim.exists()


def test_flipped_bytes(tmp_path) -> None:
    """Every byte of the file is looked at: data by checksums, the rest by the index."""
    simple(tmp_path / "a")
    file = tmp_path / "a" / "__0_0.distcp"
    good = file.read_bytes()
    wanted = content(tmp_path / "a")
    caught = 0
    for at in range(0, len(good), 23):
        file.write_bytes(good[:at] + bytes((good[at] ^ 0x10,)) + good[at + 1 :])
        try:
            assert content(tmp_path / "a") == wanted  # padding, or dates
        except IntegrityError:
            caught += 1
    assert caught > len(good) // 23 // 2


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated(tmp_path, keep) -> None:
    simple(tmp_path / "a")
    file = tmp_path / "a" / "__0_0.distcp"
    size = file.stat().st_size
    os.truncate(file, int(keep * size) if 0 < keep < 1 else keep % size)
    assert refusal(tmp_path / "a").code == "E_SIZE"
    index = tmp_path / "b" / ".metadata"
    simple(tmp_path / "b")
    size = index.stat().st_size
    os.truncate(index, int(keep * size) if 0 < keep < 1 else keep % size)
    assert refusal(tmp_path / "b").code == "E_PICKLE"


def test_missing_files(tmp_path) -> None:
    simple(tmp_path / "a")
    (tmp_path / "a" / "__0_0.distcp").unlink()
    assert refusal(tmp_path / "a").code == "E_MISSING_FILE"
    (tmp_path / "a" / "__0_0.distcp").mkdir()
    assert refusal(tmp_path / "a").code == "E_MISSING_FILE"


def test_a_newer_save_of_other_sizes_under_the_old_index(tmp_path) -> None:
    """Crash after the data, before the index: told wherever it can be seen."""
    simple(tmp_path / "a")
    simple(tmp_path / "b", 2.0, rows=50)
    shutil.copy(tmp_path / "b" / "__0_0.distcp", tmp_path / "a")
    assert refusal(tmp_path / "a").code in ("E_MIXED", "E_ARCHIVE", "E_SIZE")
    simple(tmp_path / "c", 2.0, rows=30)
    shutil.copy(tmp_path / "c" / "__0_0.distcp", tmp_path / "a")
    assert refusal(tmp_path / "a").code in ("E_MIXED", "E_ARCHIVE", "E_SIZE")
    save({"b": torch.ones(9), "w": torch.ones(8, 40)}, tmp_path / "d")
    shutil.copy(tmp_path / "d" / "__0_0.distcp", tmp_path / "a")
    assert refusal(tmp_path / "a").code in ("E_MIXED", "E_ARCHIVE", "E_SIZE")
    save({"b": torch.ones(9), "w": torch.ones(40, 8).int()}, tmp_path / "e")
    shutil.copy(tmp_path / "e" / "__0_0.distcp", tmp_path / "a")
    assert refusal(tmp_path / "a").code in ("E_MIXED", "E_ARCHIVE", "E_SIZE")


def test_data_newer_than_the_index_is_told(tmp_path) -> None:
    """The same crash with equal sizes cannot be seen, only its dates can."""
    simple(tmp_path / "a")
    with dcp.open_source(tmp_path / "a") as source:
        assert source.ignored == ()
    simple(tmp_path / "b", 2.0)
    shutil.copy(tmp_path / "b" / "__0_0.distcp", tmp_path / "a")
    data = tmp_path / "a" / "__0_0.distcp"
    os.utime(data, (0, data.stat().st_mtime + 100))
    with dcp.open_source(tmp_path / "a") as source:
        (told,) = source.ignored
        assert told.name == "__0_0.distcp"
        assert "did not finish" in told.reason


def test_something_after_the_last_chunk(tmp_path) -> None:
    simple(tmp_path / "a")
    with (tmp_path / "a" / "__0_0.distcp").open("ab") as file:
        file.write(b"\0")
    assert refusal(tmp_path / "a").code == "E_MIXED"


def edited(tmp_path: Path, edit: Callable[[Any], object]) -> str:
    path = tmp_path / "x"
    shutil.rmtree(path, ignore_errors=True)
    simple(path)
    change(path, edit)
    error = refusal(path)
    assert error.next_step
    return error.code


def info_of(metadata: Any, name: str) -> Any:
    return next(v for k, v in metadata.storage_data.items() if k.fqn == name)


def test_lying_index(tmp_path) -> None:
    def drop_place(metadata: Any) -> None:
        key = next(k for k in metadata.storage_data if k.fqn == "w")
        del metadata.storage_data[key]

    def place(**changes: object) -> Callable[[Any], object]:
        return lambda metadata: vars(info_of(metadata, "w")).update(changes)

    def tensor(**changes: object) -> Callable[[Any], object]:
        return lambda metadata: vars(metadata.state_dict_metadata["w"]).update(changes)

    def chunk(**changes: object) -> Callable[[Any], object]:
        def edit(metadata: Any) -> None:
            (only,) = metadata.state_dict_metadata["w"].chunks
            vars(only).update(changes)

        return edit

    def swap(metadata: Any) -> None:
        w, b = info_of(metadata, "w"), info_of(metadata, "b")
        w.offset, b.offset, w.length, b.length = b.offset, w.offset, b.length, w.length

    assert edited(tmp_path, drop_place) == "E_GAP"
    assert edited(tmp_path, swap) == "E_MIXED"
    for file in ("../x/__0_0.distcp", "/etc/passwd", "", "a\0b"):
        assert edited(tmp_path, place(relative_path=file)) == "E_PATH"
    assert edited(tmp_path, place(relative_path="nothing")) == "E_MISSING_FILE"
    assert edited(tmp_path, place(relative_path=7)) == "E_INDEX"
    assert edited(tmp_path, place(offset=1 << 60)) in ("E_SIZE", "E_PICKLE")
    assert edited(tmp_path, place(offset=1 << 50)) == "E_SIZE"
    assert edited(tmp_path, place(offset=-1)) == "E_PICKLE"
    assert edited(tmp_path, place(offset=1)) in ("E_ARCHIVE", "E_SIZE", "E_MIXED")
    assert edited(tmp_path, place(length=0)) in ("E_ARCHIVE", "E_MIXED")
    assert edited(tmp_path, place(length=1 << 50)) == "E_SIZE"
    assert edited(tmp_path, place(transform_descriptors=["zstd"])) == "E_FORMAT"
    assert edited(tmp_path, tensor(size=torch.Size([41, 8]))) == "E_GAP"
    assert edited(tmp_path, tensor(size=torch.Size([39, 8]))) == "E_BOUNDS"
    assert edited(tmp_path, tensor(size=torch.Size([40]))) == "E_BOUNDS"
    assert edited(tmp_path, tensor(chunks=[])) == "E_INDEX"
    assert edited(tmp_path, tensor(chunks=None)) == "E_INDEX"
    assert edited(tmp_path, tensor(properties=None)) == "E_INDEX"
    assert edited(tmp_path, chunk(sizes=torch.Size([40, 9]))) == "E_MIXED"
    assert edited(tmp_path, chunk(offsets=torch.Size([1, 0]))) == "E_GAP"
    assert edited(tmp_path, chunk(offsets=torch.Size([0]))) == "E_INDEX"
    assert edited(tmp_path, lambda m: setattr(m, "version", "9.0")) == "E_VERSION"
    assert edited(tmp_path, lambda m: setattr(m, "storage_data", None)) == "E_INDEX"
    assert edited(tmp_path, lambda m: m.state_dict_metadata.pop("w")) == "E_INDEX"


def test_a_chunk_twice(tmp_path) -> None:
    simple(tmp_path / "a")
    data = (tmp_path / "a" / ".metadata").read_bytes()
    metadata = pickle.loads(data)
    (only,) = metadata.state_dict_metadata["w"].chunks
    metadata.state_dict_metadata["w"].chunks.append(only)
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refusal(tmp_path / "a").code in ("E_GAP", "E_OVERLAP")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_not_zeros(tmp_path, by_ranks, lost) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(by_ranks / "3-fsdp" / "saved", saved)
    (saved / f"__{lost}_0.distcp").unlink()
    assert refusal(saved).code == "E_MISSING_FILE"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for key, info in list(metadata.storage_data.items()):
        if info.relative_path == f"__{lost}_0.distcp":
            del metadata.storage_data[key]
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refusal(saved).code == "E_GAP"
    for name, entry in metadata.state_dict_metadata.items():
        places = {k.offset for k in metadata.storage_data if k.fqn == name}
        entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets in places]
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refusal(saved).code == "E_GAP"


def test_swapped_files(tmp_path) -> None:
    save(
        {"a": torch.zeros(5), "b": torch.ones(9)},
        tmp_path / "a",
        single_file_per_rank=False,
    )
    first, second = sorted((tmp_path / "a").glob("*.distcp"))
    other = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(other)
    assert refusal(tmp_path / "a").code == "E_MIXED"


def test_an_index_of_each_rank_is_refused(tmp_path) -> None:
    simple(tmp_path / "a")
    (tmp_path / "a" / ".metadata").rename(tmp_path / "a" / "__0.metadata")
    assert dcp.sniff(tmp_path / "a")
    error = refusal(tmp_path / "a")
    assert isinstance(error, ConfigError)
    assert "use_collectives" in error.next_step


def test_names_that_meet_are_refused() -> None:
    tensor = OutTensor("model/a.b", "F32", (1,), lambda: [b"\0" * 4])
    bundle = Bundle({"model/a.b": tensor}, {}, {"model.a.b": 1})
    with pytest.raises(ConfigError):
        dcp.SINK.plan(bundle, SinkOptions())


@pytest.mark.slow
@given(st.data())
def test_any_damage_to_the_index_is_typed(tmp_path_factory, data) -> None:
    base = tmp_path_factory.mktemp("damage")
    simple(base / "a", rows=3)
    file = base / "a" / ".metadata"
    damaged = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 1 << 16)) % len(damaged)
        damaged[at] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        with dcp.open_source(base / "a") as source:
            read_all(source)
    except FabricError:
        pass
