"""The same seed is the same run: in this process, in another, with other hashing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sims.engine.event_log import EventLog
from sims.engine.queue import Engine
from sims.engine.randomness import stream
from sims.model.scenario import load_scenario
from sims.simulate import Simulation


def test_events_at_one_instant_happen_in_the_order_of_their_planning():
    engine, seen = Engine(), []
    for name in "abc":
        engine.at(1.0, seen.append, name)
    engine.after(0.5, seen.append, "first")
    engine.at(2.5, seen.append, "too late")
    engine.run(2.0)
    assert seen == ["first", "a", "b", "c"]
    assert (engine.now, engine.num_events) == (2.0, 4)


def test_what_should_have_happened_already_happens_now():
    engine, seen = Engine(), []
    engine.run(5.0)
    engine.at(1.0, lambda: seen.append(engine.now))
    engine.run(5.0)
    assert seen == [5.0]


def test_purposes_draw_independently():
    one, other = stream(1, "links"), stream(1, "faults")
    assert one.random() != other.random()
    again = stream(1, "links")
    again.random()
    assert again.random() == one.random()


def test_the_hash_is_of_the_lines_written():
    file = io.BytesIO()
    log, same, other = EventLog(file), EventLog(), EventLog()
    for at in range(5000):
        log.write(at / 3, f"event {at}")
        same.write(at / 3, f"event {at}")
        other.write(at / 3, f"event {at + (at == 4999)}")
    assert log.hash() == same.hash() != other.hash()
    lines = file.getvalue().decode().splitlines()
    assert (len(lines), lines[1]) == (5000, "0.333333 event 1")


def run(seed: int) -> str:
    scenario = load_scenario(Path("convergence"), 5)
    return Simulation(scenario, seed).run().log_hash


@pytest.mark.slow
def test_another_seed_is_another_run():
    assert run(1) == run(1) != run(2)


IDLE = """\
nodes = 60
connections = 48
converged_start = true
liveness = true
fault_seconds = 150
[churn]
every_seconds = 10
[writes]
refresh = true
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["convergence", "coordinator", "idle", "lookup", "paths"]
)
def test_two_processes_with_different_hashing_log_the_same_events(tmp_path, name):
    file = Path(name)
    if name == "idle":
        file = tmp_path / "idle.toml"
        file.write_text(IDLE)
    hashes = set()
    for hash_seed in ("1", "2"):  # two orders of the sets of peers, in all scenarios
        argv = [sys.executable, "-m", "fabric.app.cli", "sim", "run", str(file)]
        argv += ["--seed", "5", "--nodes", "60" if name == "idle" else "7", "--json"]
        environ = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(argv, env=environ, capture_output=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        hashes.add((found["log_hash"], found["events"], found["seed"], found["nodes"]))
        assert found["converged"] is True
        assert found["lost_writes"] == 0
        assert found["virtual_seconds"] > 120 > found["wall_seconds"] > 0
    assert len(hashes) == 1
