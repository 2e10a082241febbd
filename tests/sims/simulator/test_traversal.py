"""Peers behind NATs find relays, lose them, and become direct where they can."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sims.model.scenario import load_scenario
from sims.simulate import Simulation


@pytest.mark.slow
def test_every_pair_has_a_path_and_whoever_can_be_direct_is():
    scenario = load_scenario(Path("paths"), 24)
    scenario = msgspec.structs.replace(scenario, fault_seconds=90.0)
    report = Simulation(scenario, 2, "paths").run()
    assert report.passed, f"{report.violations}; replay: {report.replay}"
    paths = report.paths
    assert paths is not None
    assert paths.without == paths.needlessly_relayed == 0
    assert min(paths.direct, paths.punched, paths.relayed) > 0
    assert paths.direct + paths.punched + paths.relayed == 24 * 23 // 2
    assert report.core_calls["path"] > 1000


@pytest.mark.slow
def test_without_a_public_peer_nobody_behind_a_nat_is_reached():
    scenario = load_scenario(Path("paths"), 6)
    network = msgspec.structs.replace(scenario.network, nat=("symmetric",))
    scenario = msgspec.structs.replace(
        scenario, network=network, fault_seconds=20.0, settle_seconds=5.0
    )
    report = Simulation(scenario, 2, "paths").run()
    assert report.violations[-1] == "15 pairs have no path"
