"""The examples run as they stand, against a real mesh."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from fabric.jobs.spec import JobSpec, load_spec

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "train.toml"
RUN_SECONDS = 100.0
TINY = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_layers": 1,
    "model.context_tokens": 32,
    "train.outer.rounds": 2,
}
SMALL = [f"{key}={value}" for key, value in TINY.items()]


def run(home, *argv):
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"FABRIC_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_train_toml_names_every_key_and_says_which_values_are_its_own():
    tree = tomllib.loads(TRAIN.read_text())
    lines = {
        line.split("=")[0].strip(): line for line in TRAIN.read_text().splitlines()
    }

    def check(tree, default):
        by_daemon = {"submitter", "nonce", "resume_round", "signature"}
        other_kinds = {"serve"}
        assert set(tree) == set(default) - by_daemon - other_kinds
        for key, value in tree.items():
            if isinstance(value, dict):
                check(value, default[key])
            elif value != default[key] and key not in {"learning_rate"}:
                assert f"default {json.dumps(default[key])}" in lines[key], key

    check(tree, msgspec.to_builtins(JobSpec()))
    load_spec(TRAIN)


@pytest.mark.scenario
@pytest.mark.slow
def test_examples_run(mesh, form):
    form("p0")
    home = mesh.directory / "p0"
    changes = [part for change in SMALL for part in ("--set", change)]
    lines = run(home, "-m", "fabric.app.cli", "run", TRAIN, "-f", "--json", *changes)
    events = [json.loads(line) for line in lines[1:]]
    assert events[-1]["kind"] == "done"
    assert {"generation", "round"} <= {event["kind"] for event in events}

    lines = run(home, "examples/client.py", TRAIN, *SMALL)
    assert lines[0] == "p0 is in mesh lab"
    assert [line.split(":")[0] for line in lines[1:-1]] == ["round 0", "round 1"]
    root = lines[-1].removeprefix("checkpoint ")
    assert root in {row.root for row in mesh.client("p0").content()}

    lines = run(home, "examples/async_client.py", TRAIN, *SMALL)
    for seed in (0, 1):
        own = [line for line in lines if line.startswith(f"seed {seed}: ")]
        assert len(own) == 3
        assert own[-1].startswith(f"seed {seed}: checkpoint ")
