"""Every seed converges and loses nothing, under the fault mix of the research report.

20 seeds here; a soak takes all 200, and in its next pass the 200 after them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sims.model.scenario import load_scenario
from sims.simulate import Simulation

SIZES = (3, 4, 5, 7, 10, 14, 20)
LARGE = {7: 50, 13: 100, 19: 200}
"""Of each twenty seeds of a soak."""
SOAKING = int(os.environ.get("SOAK_FACTOR", "1")) > 1
PASS = int(os.environ.get("FABRIC_TEST_SEED", "1"))


def seeds() -> list[tuple[int, int]]:
    """The (seed, peers) of this run."""
    count = 200 if SOAKING else 20
    first = count * (PASS - 1) if SOAKING else 0
    found = []
    for at in range(count):
        nodes = LARGE.get(at % 20, 0) if SOAKING else 0
        found.append((first + at, nodes or SIZES[at % 20 % len(SIZES)]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "nodes"), seeds())
def test_replicas_converge_and_lose_nothing(seed, nodes):
    scenario = load_scenario(Path("convergence"), nodes)
    report = Simulation(scenario, seed, "convergence").run()
    assert report.passed, f"{report.violations}; replay: {report.replay}"
    assert report.converged
    assert report.lost_writes == 0
    assert report.writes > 200
    assert report.attacks > 30


@pytest.mark.slow
def test_both_sides_of_a_partition_agree_within_seconds():
    report = Simulation(load_scenario(Path("partition")), 1, "partition").run()
    assert report.passed, report.violations
    assert report.convergence_seconds is not None
    assert report.convergence_seconds <= 15
