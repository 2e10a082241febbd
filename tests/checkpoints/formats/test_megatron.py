"""Megatron-core: what the real package wrote, and layouts of its other versions."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp_torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from checkpoints.formats import dcp, megatron
from checkpoints.formats.pickle_values import Global
from checkpoints.formats.pickle_writer import Call, Instance, pickled
from checkpoints.formats.registry import open_source
from fabric.core.errors import ConfigError, FabricError

GOLDEN = Path(__file__).parent.parent / "golden" / "megatron-core-0.16.1"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(path: Path, state: dict[str, Any], config: dict[str, Any] = CONFIG) -> Path:
    """As Megatron does: flat names, objects in lists, and a file that says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_torch.save(
            state,
            storage_writer=FileSystemWriter(path),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    (path / "metadata.json").write_text(json.dumps(config))
    return path


def refusal(path: Path) -> FabricError:
    with pytest.raises(FabricError) as caught:
        megatron.open_source(path)
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("inside", ["", "iter_0000007"])
def test_what_the_package_wrote(inside) -> None:
    path = GOLDEN / inside
    assert megatron.sniff(path)
    whole = torch.load(GOLDEN / "whole.pt")
    with open_source(path) as source:
        assert source.format == "megatron"
        names = [name for name in source.names() if not name.startswith("rng/")]
        assert names == sorted(whole)
        for name, tensor in whole.items():
            assert tuple(source.entry(name).shape) == tuple(tensor.shape)
            assert b"".join(map(bytes, source.windows(name))) == raw(tensor)
        assert source.state["iteration"] == 7
        assert source.state["args"] == {
            "num_layers": 2,
            "params_dtype": "torch.bfloat16",
        }
        assert source.state["optimizer"]["param_groups"][0]["lr"] == 0.1
        assert len([name for name in source.names() if name.startswith("rng/")]) == 2
        assert source.ignored == ()


def test_later_versions_keep_the_common_state_as_an_object(tmp_path) -> None:
    common = {"iteration": 3, "args": {"lr": 0.5}, "optimizer": {"param_groups": [{}]}}
    save(
        tmp_path / "a",
        {"decoder.w": torch.ones(2), "common_state/shard_0_1": [common]},
    )
    with megatron.open_source(tmp_path / "a") as source:
        assert source.names() == ["model/decoder.w"]
        assert source.state["iteration"] == 3
        assert source.state["args"] == {"lr": 0.5}


def test_buffers_of_many_parameters_are_carried_whole_and_told(tmp_path) -> None:
    key = (
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0."
        "dtype_(torch.bfloat16, torch.float32).bucket_idx_0"
    )
    state = {f"{key}.{slot}": torch.arange(9.0) for slot in ("exp_avg", "param")}
    save(tmp_path / "a", {"decoder.w": torch.ones(2), **state})
    with megatron.open_source(tmp_path / "a") as source:
        buffer = key.removeprefix("optimizer.")
        assert source.names() == [
            "model/decoder.w",
            f"optimizer/exp_avg/{buffer}",
            f"optimizer/fp32/{buffer}",
        ]
        (told,) = source.ignored
        assert "fully-reshardable" in told.reason


def test_flattened_ranges_are_refused(tmp_path) -> None:
    save(tmp_path / "a", {"optimizer.state.exp_avg.w": torch.ones(2, 4)})
    file = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    entry = {"nd_reformulated_orig_global_shape": (4, 2)}
    metadata.mcore_data = {"optimizer.state.exp_avg.w": entry}
    file.write_bytes(pickle.dumps(metadata))
    error = refusal(tmp_path / "a")
    assert error.code == "E_FORMAT"
    assert "flattened" in error.reason


@pytest.mark.parametrize(
    "config",
    [
        {"sharded_backend": "zarr", "sharded_backend_version": 1},
        {"sharded_backend": "fsdp_dtensor"},
        {"sharded_backend": "torch_dist", "sharded_backend_version": 2},
    ],
)
def test_other_backends_are_refused(tmp_path, config) -> None:
    save(tmp_path / "a", {"w": torch.ones(2)}, config)
    assert megatron.sniff(tmp_path / "a")
    error = refusal(tmp_path / "a")
    assert error.code == "E_FORMAT"
    assert "torch_dist" in error.next_step


def test_a_config_that_is_none(tmp_path) -> None:
    path = save(tmp_path / "a", {"w": torch.ones(2)})
    for text in (
        b'{"sharded_backend"',
        b'{"sharded_backend": 7}',
        b'"sharded_backend"',
    ):
        (path / "metadata.json").write_bytes(text)
        assert refusal(path).code == "E_INDEX"
    (path / "metadata.json").write_text("{}")
    assert not megatron.sniff(path)
    assert dcp.sniff(path)


def test_enums_in_arguments_are_told_and_code_is_not_run(tmp_path) -> None:
    path = save(tmp_path / "a", {"w": torch.ones(2)})
    enum = Call(Global("megatron.core.transformer.enums", "AttnBackend"), (5,))
    arguments = Instance(Global("argparse", "Namespace"), {"a": 1, "b": enum})
    program = pickled({"args": arguments})
    write_archive(path / "common.pt", program)
    with megatron.open_source(path) as source:
        assert source.state == {"args": {"a": 1}}
        (told,) = source.ignored
        assert told.name == "args.b"
        assert "AttnBackend" in told.reason
    write_archive(path / "common.pt", b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.")
    with megatron.open_source(path) as source:
        (told,) = source.ignored
        assert told.name == "common.pt"
        assert "os.system" in told.reason


def write_archive(path: Path, program: bytes) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("common/data.pkl", program)
    path.write_bytes(file.getvalue())


def test_the_latest_must_be_there(tmp_path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "c")
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("release")
    assert isinstance(refusal(tmp_path / "c"), ConfigError)
    shutil.rmtree(tmp_path / "c" / "iter_0000007")
    assert not megatron.sniff(tmp_path / "c")
