"""Leaders die and the network splits: the job goes on, one generation per epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from sims.model.scenario import load_scenario
from sims.simulate import Simulation


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_two_generations_share_an_epoch_and_the_job_goes_on(seed):
    scenario = load_scenario(Path("coordinator"))
    report = Simulation(scenario, seed, "coordinator").run()
    assert report.passed, f"{report.violations}; replay: {report.replay}"
    assert report.generations >= 4, "three leaders were killed"
    assert report.bytes_by_kind["jobs"] > 0
