"""What an idle peer sends does not depend on how many there are; ghosts vanish."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sims.measure import fit, traffic_exponent, write_cost
from sims.model.scenario import load_scenario
from sims.simulate import Simulation


def test_a_line_is_found_through_its_points():
    line = fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert line.intercept == pytest.approx(3.0)
    assert line.slope == pytest.approx(2.0)


@pytest.mark.slow
def test_idle_traffic_per_peer_is_flat():
    exponent, rates = traffic_exponent((50, 120, 300), seconds=120.0)
    assert exponent <= 0.1, rates
    assert all(0 < rate < 1000 for rate in rates)


@pytest.mark.slow
def test_writes_cost_bytes_in_proportion():
    line, reports = write_cost((1.0, 2.0, 4.0), peers=20, seconds=40.0)
    for report in reports:
        expected = line.intercept + line.slope * report.writes / 40.0
        assert report.bytes_per_peer_second == pytest.approx(expected, rel=0.1)
    assert line.slope > 0


@pytest.mark.slow
def test_peers_come_and_go_and_no_ghost_stays():
    scenario = load_scenario(Path("idle"), 40)
    scenario = msgspec.structs.replace(scenario, fault_seconds=400.0)
    report = Simulation(scenario, 1, "idle").run()
    assert report.passed, report.violations
    assert report.false_deaths == 0
    assert report.core_calls["liveness"] > 1000
    # each entry's signature once, however many peers checked it
    assert report.signatures_verified < report.core_calls["offer"] / 5


@pytest.mark.slow
def test_sessions_of_measured_length_also_end_in_agreement():
    scenario = load_scenario(Path("convergence"), 8)
    churn = msgspec.structs.replace(
        scenario.churn, session="weibull", session_seconds=60.0, down_seconds=10.0
    )
    scenario = msgspec.structs.replace(scenario, churn=churn)
    report = Simulation(scenario, 2, "convergence").run()
    assert report.passed, report.violations
