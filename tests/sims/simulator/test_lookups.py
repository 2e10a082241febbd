"""Who holds what is found although peers come and go, and silent ones do not delay."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sims.model.scenario import load_scenario
from sims.simulate import Simulation


@pytest.mark.slow
def test_holders_are_found_under_churn():
    scenario = load_scenario(Path("lookup"), 70)
    scenario = msgspec.structs.replace(scenario, fault_seconds=300.0)
    report = Simulation(scenario, 3, "lookup").run()
    assert report.passed, f"{report.violations}; replay: {report.replay}"
    found = report.lookups
    assert found is not None
    assert found.searches > 80
    assert found.found_share >= 0.95
    assert 1 <= found.hops_p50 <= found.hops_max <= 6
    assert found.seconds_p95 <= 6.1, "a search ends in time with what it has"
    assert report.core_calls["lookup"] > found.searches
    assert report.bytes_by_kind["lookup"] > 0
