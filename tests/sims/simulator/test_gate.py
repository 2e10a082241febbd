"""Who was revoked loses its connections as the news goes round, and counts no more."""

from pathlib import Path

import msgspec
import pytest

from sims.model.scenario import load_scenario
from sims.simulate import Simulation


@pytest.mark.slow
def test_a_revoked_peer_is_refused_by_all_and_the_others_agree():
    scenario = load_scenario(Path("convergence"), 7)
    scenario = msgspec.structs.replace(scenario, liveness=True)
    simulation = Simulation(scenario, 3, "convergence")
    report = simulation.run()
    assert report.passed, report.violations
    mesh, network = simulation.mesh, simulation.network
    (number,) = simulation.drama.revoked
    revoked = mesh.nodes[number]
    online = [node for node in mesh.nodes if network.online[node.number]]
    others = [node for node in online if node is not revoked]
    assert len(others) > 1
    assert revoked.barred
    assert all(not network.linked(node.number, number) for node in others)
    assert not mesh.connected(revoked)
    assert all(mesh.connected(node) for node in others)
    assert all(revoked.peer not in mesh.connected(node) for node in others)
    assert mesh.vitals is not None
    assert all(revoked.peer not in mesh.vitals.dead(node) for node in others)
    assert report.false_deaths == 0
