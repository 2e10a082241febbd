"""Liveness on real daemons: a killed peer leaves every view, a slow one stays."""

import time

import pytest

from crdt_store.liveness.config import LivenessConfig
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

NAMES = ("p0", "p1", "p2", "p3")
STOPPED_SECONDS = 6.0


def seen(mesh, name):
    """Return the liveness of each other member, by name, as ``fabric peers`` has it."""
    return {row.name: row.liveness for row in mesh.client(name).status().peers}


def loads(mesh, name):
    """Return in how many jobs the other members said they take part."""
    return {row.running for row in mesh.client(name).status().peers}


def all_alive(mesh, names):
    return all(set(seen(mesh, name).values()) == {"alive"} for name in names)


def over_in(seconds):
    """Return a condition that holds once ``seconds`` have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def test_a_killed_peer_is_dead_in_every_view(mesh, form):
    form(*NAMES)
    wait_until(lambda: all_alive(mesh, NAMES), 60, "everybody to be alive")
    # a connection is a sign of life; loads come with the probes after it
    wait_until(lambda: loads(mesh, "p0") == {0}, 60, "the loads of all")

    mesh.kill("p3")
    bound = LivenessConfig().ghost_bound_seconds(len(NAMES))
    rest = NAMES[:3]
    found = set()

    def others(name):
        """Return the liveness of those that live, and collect it."""
        states = {state for who, state in seen(mesh, name).items() if who != "p3"}
        found.update(states)
        return states

    wait_until(
        lambda: (
            all(others(name) for name in rest)
            and all(seen(mesh, name).get("p3") == "dead" for name in rest)
        ),
        bound,
        "the ghost to be dead in every view",
    )
    # a doubt may come, on a busy machine, and goes
    wait_until(
        lambda: all(others(name) == {"alive"} for name in rest),
        60,
        "the others to be alive",
    )
    assert "dead" not in found
    assert any("liveness: dead" in line for line in mesh.client("p0").why("p3"))

    mesh.start("p3")
    wait_until(lambda: all_alive(mesh, NAMES), 60, "the peer to be back")


def test_a_stopped_process_is_slow_not_dead(mesh, form):
    form(*NAMES)
    wait_until(lambda: all_alive(mesh, NAMES), 60, "everybody to be alive")
    rest = NAMES[:3]
    found = set()

    def watched(until):
        """Collect what is said of p3 until the condition holds."""

        def look():
            found.update(seen(mesh, name)["p3"] for name in rest)
            return until()

        return look

    for _ in range(2):
        mesh.pause("p3")
        wait_until(watched(over_in(STOPPED_SECONDS)), 60, "the stop to pass")
        mesh.resume("p3")
        wait_until(watched(over_in(STOPPED_SECONDS)), 60, "it to run again")
    wait_until(watched(lambda: all_alive(mesh, NAMES)), 60, "everybody to be alive")
    assert "dead" not in found
