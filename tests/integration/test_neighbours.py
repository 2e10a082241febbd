"""More members than neighbours, on real daemons: connected in part, whole in effect."""

import os

import pytest

from crdt_store.liveness.config import LivenessConfig
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

LIMIT = 4
IDLE = 6.0
SETTINGS = (
    "train.worker_threads=1",
    f"mesh.max_neighbours={LIMIT}",
    f"mesh.idle_seconds={IDLE}",
)
WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1
NAMES = tuple(f"p{number}" for number in range(9 if WHOLE else 6))


def views(mesh, names):
    return {name: mesh.client(name).status() for name in names}


def reach(view):
    """Return how each other member is reached, by name."""
    return {row.name: row.reach for row in view.peers}


def connected(view):
    return {name for name, how in reach(view).items() if how == "connected"}


def settled(found):
    """Return whether all see all, with few connections, about which no two disagree."""
    names = found.keys()
    return all(
        set(reach(view)) == set(names) - {name}
        and set(reach(view).values()) <= {"connected", "on demand"}
        and len(connected(view)) <= LIMIT
        and {row.liveness for row in view.peers} == {"alive"}
        and all(name in connected(found[other]) for other in connected(view))
        for name, view in found.items()
    )


def is_whole(found):
    """Return whether everybody is reached over the connections in ``found``."""
    seen, frontier = set(), [min(found)]
    while frontier:
        name = frontier.pop()
        if name not in seen:
            seen.add(name)
            frontier += connected(found[name])
    return seen == set(found)


def test_more_peers_than_the_four_neighbours_of_each(mesh, tiny_spec):
    mesh.start_all(NAMES, SETTINGS)
    mesh.create_mesh("p0", "lab")
    token = mesh.client("p0").invite(uses=9)
    for name in NAMES[1:]:
        mesh.client(name).join(token)
    found = {}

    def few_and_all():
        found.update(views(mesh, NAMES))
        return settled(found)

    wait_until(few_and_all, 120, "few connections, everybody seen")
    assert is_whole(found)

    one, other = next(
        (name, far)
        for name, view in found.items()
        for far, how in reach(view).items()
        if how == "on demand"
    )
    assert next(iter(mesh.client(one).ping(other))).peer == found[other].peer
    assert any("not a neighbour" in line for line in mesh.client(other).why(one)) or (
        "connected" in " ".join(mesh.client(other).why(one))
    )

    # participants are all who are there, so most of them are no neighbours
    spec = tiny_spec(rounds=4, inner_steps=2, min_peers=5, max_peers=5)
    job = mesh.client(one).submit(spec).id

    def state_at(name):
        rows = {row.job: row for row in mesh.client(name).jobs()}
        return rows[job].state if job in rows else ""

    wait_until(lambda: state_at(one) == "done", 150, "the job to be done")
    wait_until(
        lambda: all(state_at(name) == "done" for name in NAMES),
        60,
        "all to know that it is",
    )
    wait_until(few_and_all, 120, "idle connections to be closed")

    ghost = NAMES[-1]
    rest = NAMES[:-1]
    mesh.kill(ghost)
    wait_until(
        lambda: all(
            {row.liveness for row in view.peers if row.name == ghost} == {"dead"}
            and reach(view)[ghost] == "unreachable"
            for view in views(mesh, rest).values()
        ),
        LivenessConfig().ghost_bound_seconds(len(NAMES)),
        "the ghost to be dead in every view",
    )
    wait_until(
        lambda: is_whole(views(mesh, rest)), 60, "the ghost's places to be taken"
    )
    mesh.start(ghost, SETTINGS)
    wait_until(few_and_all, 120, "it to be back")
