"""Every command of docs/converter.md, run in order as a reader would type it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import cli
from checkpoints.formats.registry import FORMATS
from checkpoints.formats.shard_files import plan_file
from checkpoints.formats.sink import OutTensor
from checkpoints.hashed_file import HashedFile
from checkpoints.model_tensors import expected_tensors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/converter.md").read_text()
COMMANDS = [
    shlex.split(line)
    for line in PAGE.splitlines()
    if re.match(r"fabric-ckpt [a-z]+( |$)", line)
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}


def make_model(directory):
    """The model that the page calls my-model."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = {}
    for name, shape in expected_tensors(CONFIG).items():
        size = 4
        for extent in shape:
            size *= extent
        data = bytes(range(1, 61)) * (size // 60 + 1)
        content = data[:size]
        tensors[name] = OutTensor(name, "F32", shape, lambda raw=content: [raw])
    planned = plan_file("model.safetensors", tensors, {"format": "pt"}, str)
    with HashedFile(directory / planned.path) as file:
        for chunk in planned.chunks():
            file.write(chunk)
        file.finish()


@pytest.mark.slow
def test_the_commands_work_in_order(tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", command)
        try:
            cli.main()
        except SystemExit as left:
            out, err = capsys.readouterr()
            pytest.fail(f"{shlex.join(command)}: exit {left.code}: {err}{out}")
        out, _ = capsys.readouterr()
        assert out
        if command[1] in {"convert", "consolidate"} and "--dry-run" not in command:
            assert "read again and equal to the source" in out
    made = {path.name for path in tmp_path.iterdir()}
    assert {"saved", "half", "everything.safetensors", "four-ranks"} <= made


def test_the_page_shows_every_verb_and_format():
    # fetch, which `fabric ckpt` adds, needs a mesh
    verbs = {name for name in cli.app if not name.startswith("-")} - {"fetch"}
    assert {command[1] for command in COMMANDS} == verbs
    listed = set(re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE))
    assert listed == set(FORMATS)
    for name, each in FORMATS.items():
        row = re.search(rf"^\| `{name}` .*$", PAGE, re.MULTILINE).group()
        assert (row.count("yes") == 2) == each.writable


@pytest.mark.slow
def test_the_command_is_installed(tmp_path):
    script = Path(sys.executable).parent / "fabric-ckpt"
    done = subprocess.run(
        [script, "verify", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "E_NOT_FOUND" in done.stderr
