"""The real `fabric-ckpt` in a process of its own, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import cli, cli_output
from checkpoints.parts import bytes_source
from checkpoints.writer import CheckpointWriter

ROOT = Path(__file__).parents[2]
# torch and numpy cannot be imported in these processes
PRELUDE = (
    "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; "
    "from checkpoints.cli import main; main()"
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command in this process: (status, stdout, stderr)."""
    monkeypatch.setattr(cli_output, "PROGRESS_SECONDS", 3600)  # a busy machine is slow

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["fabric-ckpt", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        return status, out, err

    return command


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_inspect(tmp_path, lab, run):
    root = lab.save(tmp_path)
    status, out, _ = run("inspect", tmp_path, "--json")
    found = json.loads(out)
    assert (status, found["root"], found["step"]) == (0, root, 1)
    assert found["sections"]["model"]["elements"] == 512 * 1024 + 3
    assert {t["name"]: t["alias_of"] for t in found["tensors"]}["model/tied"]
    status, out, _ = run("inspect", tmp_path, "--tensors")
    assert status == 0
    assert root in out
    assert "model/tied  F32 512x1024 = model/rows" in out


def test_verify(tmp_path, lab, run):
    root = lab.save(tmp_path)
    status, out, err = run("verify", tmp_path, "--root", root)
    assert (status, err) == (0, "")
    assert out.startswith("ok: ")
    flip(tmp_path / "step-1/rank1-0.safetensors")
    status, out, err = run("verify", tmp_path, "--json")
    report = json.loads(out)
    assert status == 8
    assert not report["ok"]
    (finding,) = report["findings"]
    assert finding["file"] == "rank1-0.safetensors"
    assert (finding["block"], finding["tensors"]) == (1, ["model/rows"])
    assert "E_INTEGRITY" in err
    assert "next: " in err
    status, out, _ = run("verify", tmp_path)
    assert status == 8
    assert "block 1 (from byte 1048576)" in out


def test_diff(tmp_path, lab, run):
    lab.save(tmp_path / "a")
    lab.save(tmp_path / "b")
    assert run("diff", tmp_path / "a", tmp_path / "b")[0] == 0
    with CheckpointWriter(tmp_path / "c", 1) as writer:
        sources = [
            bytes_source("model/bias", "BF16", (3,), bytes(6)),
            bytes_source("model/rows", "U8", (1,), b"x"),
            bytes_source("model/none", "I64", (0, 5), b""),
            bytes_source("outer/count", "U8", (), b"\x07"),
            bytes_source("new", "U8", (), b"\x07"),
        ]
        writer.commit([writer.write("w", sources)], state={"round": 1})
    status, out, err = run("diff", tmp_path / "a", tmp_path / "c", "--json")
    assert status == 1
    kinds = {d["name"]: d["kind"] for d in json.loads(out)["differences"]}
    assert kinds == {
        "model/bias": "elements",
        "model/rows": "type",
        "model/none": "shape",
        "model/tied": "only_in_first",
        "new": "only_in_second",
        "state.lr": "state",
        "state.note": "state",
    }
    assert err == "7 differences\n"


def test_refusals_have_code_reason_and_next_step(tmp_path, run):
    for arguments, status, code in [
        (["verify", tmp_path / "nowhere"], 2, "E_NOT_FOUND"),
        (["verify"], 2, "E_USAGE"),
        (["reshard", tmp_path], 2, "E_USAGE"),
        (["convert", tmp_path, tmp_path, "--to", "pickle"], 2, "E_FORMAT"),
        (["convert", tmp_path, tmp_path / "x", "--to", "canonical"], 2, "E_FORMAT"),
    ]:
        found, out, err = run(*arguments, "--json")
        error = json.loads(out)["error"]
        assert (found, error["code"]) == (status, code)
        assert error["reason"]
        assert error["next_step"]
        assert code in err


@pytest.mark.slow
def test_a_process_without_torch_inspects_verifies_and_converts(tmp_path, lab):
    def process(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    config = {"model_type": "other"}
    root = lab.save(tmp_path / "c", model_config=config)
    status, out, _ = process("inspect", tmp_path / "c", "--json")
    assert (status, json.loads(out)["root"]) == (0, root)
    assert process("verify", tmp_path / "c")[0] == 0
    status, out, err = process(
        "convert", tmp_path / "c", tmp_path / "hf", "--to", "huggingface", "--json"
    )
    assert status == 0
    assert all(line.startswith("convert: ") for line in err.splitlines())
    report = json.loads(out)
    assert report["verified"]
    actions = {t["source"]: t["action"] for t in report["tensors"]}
    assert actions == {
        "model/rows": "copied",
        "model/tied": "copied",
        "model/bias": "copied",
        "model/none": "copied",
        "outer/count": "ignored",
    }
    status, out, _ = process(
        "convert", tmp_path / "hf", tmp_path / "back", "--to", "canonical"
    )
    assert status == 0
    assert "equal to the source" in out
    flip(tmp_path / "c/step-1/rank0-0.safetensors", 1 << 20)
    status, out, err = process("verify", tmp_path / "c", "--json")
    assert (status, json.loads(out)["findings"][0]["block"]) == (8, 1)
    status, out, err = process(
        "convert", tmp_path / "c", tmp_path / "hf2", "--to", "huggingface"
    )
    assert (status, out) == (8, "")
    assert "E_BLOCK" in err
    assert not (tmp_path / "hf2").exists()
