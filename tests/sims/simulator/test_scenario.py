from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fabric.core.errors import ConfigError
from sims.command import run
from sims.lab.expected import can_be_direct, is_a_guess
from sims.lab.topology import NatKind
from sims.model.paths import path_between
from sims.model.scenario import BUILT_IN, Scenario, load_scenario
from sims.report.plots import write_plots
from sims.simulate import Simulation


@pytest.mark.parametrize("file", sorted(BUILT_IN.glob("*.toml")), ids=lambda f: f.stem)
def test_our_scenarios_are_valid_and_say_what_they_are(file):
    assert load_scenario(file).summary
    assert load_scenario(Path(file.stem), 11).nodes == 11


@pytest.mark.parametrize(
    ("text", "says", "step"),
    [
        ("node = 3", "unknown setting node", "did you mean nodes?"),
        ("[network]\ndrp = 0.1", "network.drp", "did you mean network.drop?"),
        ("[store]\nsync_period = 1", "store.sync_period", "store.sync_period_seconds?"),
        ("[network]\ndrop = 2.0", "drop", "correct"),
        ("nodes = [", "not TOML", "correct"),
    ],
)
def test_a_wrong_scenario_is_refused_with_the_nearest_name(tmp_path, text, says, step):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(file)
    assert says in caught.value.reason
    assert step in caught.value.next_step


def test_an_unknown_scenario_names_ours():
    with pytest.raises(ConfigError) as caught:
        load_scenario(Path("convergense.toml"))
    assert "convergence" in caught.value.next_step


def test_unknown_regions_and_nats_are_refused(tmp_path):
    for section in ('regions = ["mars"]', 'nat = ["moat"]'):
        file = tmp_path / "wrong.toml"
        file.write_text(f"[network]\n{section}")
        with pytest.raises(ConfigError):
            Simulation(load_scenario(file), 1)


@pytest.mark.parametrize("one", NatKind)
@pytest.mark.parametrize("other", NatKind)
def test_paths_agree_with_what_the_laboratory_expects(one, other):
    """The daemon's rule, given what it learns, against the theory of the NATs."""
    possible = can_be_direct(one.behaviour, other.behaviour) or is_a_guess(
        one.behaviour, other.behaviour
    )
    if NatKind.ONLY_443 in (one, other):
        return  # the model relays them; the daemon may do better
    assert (path_between(one, other) != "relay") == possible


def test_a_failing_run_prints_its_seed_and_how_to_replay_it(tmp_path, capsys):
    file = tmp_path / "hopeless.toml"
    file.write_text(
        "nodes = 3\nfault_seconds = 5\nsettle_seconds = 0\n[writes]\ntotal = 20\n"
        "[network]\ndrop = 1.0\n"
    )
    with pytest.raises(SystemExit) as ended:
        run(file, seed=7, json=True)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    promised = "seed nodes log_hash converged lost_writes virtual_seconds wall_seconds"
    assert found.keys() >= set(promised.split())
    assert found["converged"] is False
    assert "seed 7" in printed.err
    assert f"fabric sim run {file} --seed 7 --nodes 3" in printed.err


@pytest.mark.slow
def test_plots_and_log_are_written(tmp_path, capsys):
    run(Path("seven"), out=tmp_path)
    capsys.readouterr()
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {"convergence.png", "traffic.png", "staleness.png", "events.log"}
    assert (tmp_path / "traffic.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_bytes())["nodes"] == 7


def test_without_matplotlib_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as caught:
        write_plots(tmp_path, [], "x")
    assert "peerfabric[dev]" in caught.value.next_step


def test_a_scenario_has_sensible_defaults():
    assert Scenario().nodes == 7
