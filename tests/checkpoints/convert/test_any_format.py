"""inspect, verify and diff on every format that can be written, and the way back."""

import json
import random
import sys
from math import prod

import pytest

from checkpoints import cli, cli_output
from checkpoints.conversion import convert
from checkpoints.conversion_plan import ConvertOptions
from checkpoints.dtypes import item_bytes
from checkpoints.formats.registry import FORMATS, formats_written, open_source
from checkpoints.parts import bytes_source
from checkpoints.writer import CheckpointWriter

SINGLE = {"torch": "all.pt", "safetensors": "all.safetensors"}
SHAPES = {"w": (40, 30), "b": (30,), "scale": ()}
OTHERS = {"h": ("BF16", (7, 3)), "i": ("I64", (5,)), "f": ("F8_E4M3", (4, 4))}


@pytest.fixture
def source(tmp_path):
    """A model with moments, a tie, types of every width and state."""
    rng = random.Random(1)

    def tensor(name, dtype, shape):
        data = rng.randbytes(prod(shape) * item_bytes(dtype))
        return bytes_source(name, dtype, shape, data)

    sources = [
        tensor(f"{section}/{name}", "F32", shape)
        for section in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
        for name, shape in SHAPES.items()
    ]
    step = b"\0\0\x80\x3f"
    sources += [bytes_source(f"optimizer/step/{n}", "F32", (), step) for n in SHAPES]
    sources += [tensor(f"model/{n}", *kind) for n, kind in OTHERS.items()]
    groups = [{"lr": 0.1, "params": list(SHAPES)}]
    state = {
        "optimizer": {"param_groups": groups},
        "model_config": {"model_type": "other"},
    }
    with CheckpointWriter(tmp_path / "c", 3) as writer:
        parts = [writer.write("w", sources)]
        writer.commit(parts, state=state, aliases={"model/tied": "model/w"})
    return tmp_path / "c"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command in this process: (status, stdout, stderr)."""
    monkeypatch.setattr(cli_output, "PROGRESS_SECONDS", 3600)  # a busy machine is slow

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["fabric-ckpt", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return command


@pytest.mark.slow
@pytest.mark.parametrize("to", formats_written())
def test_the_verbs_on_every_format(tmp_path, source, run, to):
    target = tmp_path / SINGLE.get(to, "out")
    status, out, err = run("convert", source, target, "--to", to, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["verified"]
    with open_source(source) as opened:
        assert [each["source"] for each in report["tensors"]] == opened.names()
    assert all(each["reason"] for each in report["ignored"])
    status, out, _ = run("inspect", target, "--json")
    found = json.loads(out)
    assert (status, found["format"]) == (0, to)
    kept = {t["name"]: (t["dtype"], t["shape"]) for t in found["tensors"]}
    for name, shape in SHAPES.items():
        assert kept[f"model/{name}"] == ("F32", list(shape))
    status, out, _ = run("verify", target)
    assert status == 0
    assert ("has no hashes" in out) == (to != "canonical")
    moments = to != "huggingface"
    status, out, _ = run("diff", source, target, "--tensors-only")
    assert status == (0 if moments else 1), out
    assert set(out.split()) >= ({"same:"} if moments else {"only_in_first:"})
    back = tmp_path / "back"
    convert(target, back, ConvertOptions(to="canonical"))
    status, out, _ = run("diff", target, back, "--json")
    assert json.loads(out)["same"]


@pytest.mark.slow
@pytest.mark.parametrize("to", sorted(set(formats_written()) - {"canonical"}))
def test_a_file_cut_short_is_found(tmp_path, source, run, to):
    target = tmp_path / SINGLE.get(to, "out")
    convert(source, target, ConvertOptions(to=to))
    files = [target] if target.is_file() else list(target.rglob("*"))
    largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[: len(data) - len(data) // 3])
    status, out, _ = run("verify", target, "--json")
    assert status == 8
    assert not json.loads(out)["ok"]
    status, _, err = run("convert", target, tmp_path / "new", "--to", "canonical")
    assert status == 8
    assert "next: " in err
    assert not (tmp_path / "new/step-3").exists()


def test_every_format_says_what_it_is():
    assert all(each.title for each in FORMATS.values())
