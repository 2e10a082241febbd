"""Safetensors of ranks: whole, or refused; torch's consolidation fills and cuts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.formats import dcp_safetensors, torch_file
from checkpoints.formats.registry import open_source
from checkpoints.formats.source import Source
from fabric.core.errors import ConfigError, FabricError

RANKS = Path(__file__).parent / "dcp_ranks.py"


def read_all(source: Source) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            source.entry(name).dtype,
            tuple(source.entry(name).shape),
            b"".join(bytes(part) for part in source.windows(name)),
        )
        for name in source.names()
    }


def shard(base: Path, rank: int, name: str, part: torch.Tensor, at: list[int]) -> Path:
    file = base / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
    info = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": at}})}
    save_file({name: part.contiguous()}, file, metadata=info)
    return file


def rows(base: Path, whole: torch.Tensor, ranks: int = 4) -> Path:
    each = -(-len(whole) // ranks)
    files = [
        shard(base, rank + 1, "w", part, [each * rank] + [0] * (whole.dim() - 1))
        for rank, part in enumerate(whole.split(each))
    ]
    return files[-1]


def refusal(path: Path) -> FabricError:
    with pytest.raises(FabricError) as caught:
        dcp_safetensors.open_source(path)
    assert caught.value.next_step
    return caught.value


@pytest.mark.slow
def test_real_ranks(tmp_path) -> None:
    cases = ["2-fsdp-hf", "4-grid-hf"]
    command = [sys.executable, str(RANKS), str(tmp_path), *cases]
    subprocess.run(
        command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for case in cases:
        last = max((tmp_path / case / "saved").glob("*.safetensors"))
        file = tmp_path / case / "whole.pt"
        with open_source(last) as source, open_source(file) as whole:
            assert source.format == "dcp-safetensors"
            assert read_all(source) == read_all(whole), case
        assert torch_file.sniff(file)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.bfloat16]
)
def test_types_that_consolidation_refuses(tmp_path, dtype) -> None:
    whole = (torch.arange(66).reshape(11, 6) % 2).to(dtype)
    with dcp_safetensors.open_source(rows(tmp_path, whole)) as source:
        data = b"".join(map(bytes, source.windows("model/w", 7)))
        assert source.entry("model/w").shape == (11, 6)
    assert data == whole.view(torch.uint8).numpy().tobytes()


def test_a_directory_does_not_say_how_many_ranks_there_were(tmp_path) -> None:
    rows(tmp_path, torch.arange(40.0))
    assert dcp_safetensors.sniff(tmp_path)
    error = refusal(tmp_path)
    assert isinstance(error, ConfigError)
    assert error.code == "E_RANKS"


def test_missing_ranks(tmp_path) -> None:
    last = rows(tmp_path, torch.arange(40.0).reshape(20, 2))
    last.rename(tmp_path / "elsewhere")
    assert refusal(last).code in ("E_GAP", "E_MISSING_FILE", "E_NOT_FOUND")
    (tmp_path / "elsewhere").rename(last)
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    assert refusal(last).code == "E_GAP"


def test_files_after_the_last_are_told(tmp_path) -> None:
    whole = torch.arange(40.0)
    last = rows(tmp_path, whole)
    shard(tmp_path, 5, "w", torch.zeros(10), [40])
    with dcp_safetensors.open_source(last) as source:
        assert [each.name for each in source.ignored] == [
            "shard-00005-model-00001-of-00001.safetensors"
        ]
        assert source.entry("model/w").shape == (40,)


def test_parts_that_do_not_fit(tmp_path) -> None:
    last = rows(tmp_path, torch.arange(40.0))
    file = shard(tmp_path, 2, "w", torch.zeros(10), [5])
    assert refusal(last).code == "E_OVERLAP"
    shard(tmp_path, 2, "w", torch.zeros(10).int(), [10])
    assert refusal(last).code == "E_MIXED"
    shard(tmp_path, 2, "w", torch.zeros(10, 1), [10, 0])
    assert refusal(last).code == "E_MIXED"
    shard(tmp_path, 2, "w", torch.zeros(10), [10, 0])
    assert refusal(last).code == "E_INDEX"
    shard(tmp_path, 2, "w", torch.zeros(10), [-10])
    assert refusal(last).code in ("E_BOUNDS", "E_INDEX")
    save_file({"w": torch.zeros(10)}, file)
    assert refusal(last).code == "E_MIXED"
    shard(tmp_path, 2, "other", torch.zeros(10), [10])
    assert refusal(last).code == "E_GAP"
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(last).code == "E_SAFETENSORS"
