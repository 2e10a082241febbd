"""Seven daemons parted for a while, writes on both sides: equal soon after the heal.

Once as `fabric sim partition` cuts, without root; once by a network that is two: then
nobody is told, connections die of silence, and dials back off as in life.
"""

import os
import time
from contextlib import contextmanager

import pytest

from fabric.app.control_messages import StatusView
from sims.lab.lab import Lab
from sims.lab.namespaces import obstacle
from sims.lab.topology import Site, Topology
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1
PARTED_SECONDS = 60.0 if WHOLE else 15.0
HEAL_SECONDS = 15.0
"""What the design allows from the heal until all states are equal."""
CALM_SECONDS = 60.0
WRITE_EVERY_SECONDS = 1.0
NAMES = tuple(f"p{i}" for i in range(7))
SIDES = NAMES[:4], NAMES[4:]
WRITERS = SIDES[0][0], SIDES[1][0]


def views_of(mesh, names=NAMES) -> list[StatusView]:
    return [mesh.client(name).status() for name in names]


def linked(mesh, side=NAMES) -> bool:
    """Whether each of ``side`` is connected with the rest of it, and nobody else."""
    views = views_of(mesh, side)
    ids = {view.peer for view in views}
    return all(
        {row.peer for row in view.peers if row.connected} == ids - {view.peer}
        for view in views
    )


def equal(mesh) -> bool:
    return len({view.state_hash for view in views_of(mesh)}) == 1


def invites(mesh, name) -> set[str]:
    return {row.subject for row in mesh.client(name).trust() if row.kind == "invite"}


def prepare(mesh) -> None:
    """Two writers, one on each side to be; everybody knows."""
    other = mesh.client(WRITERS[1]).status().peer
    mesh.client(WRITERS[0]).grant(other, "admin")
    wait_until(
        lambda: mesh.client(WRITERS[1]).status().role == "admin", 30, "the grant"
    )
    wait_until(lambda: linked(mesh) and equal(mesh), CALM_SECONDS, "one state")


def write_for(mesh, seconds) -> None:
    """Write on both sides until the time is over and the sides know no other."""
    started, writes = time.monotonic(), 0

    def over() -> bool:
        nonlocal writes
        passed = time.monotonic() - started
        if passed >= writes * WRITE_EVERY_SECONDS:
            writes += 1
            for name in WRITERS:
                mesh.client(name).invite(uses=1)
        return passed >= seconds and all(linked(mesh, side) for side in SIDES)

    wait_until(over, seconds + CALM_SECONDS, "the partition to have lasted")
    assert writes > seconds / WRITE_EVERY_SECONDS / 3


def heal_seconds(mesh, part, heal) -> float:
    """Part, write, heal; return how long it takes until all states are equal."""
    part()
    write_for(mesh, PARTED_SECONDS)
    written = [invites(mesh, name) for name in WRITERS]
    assert written[0] - written[1]
    assert written[1] - written[0]
    assert not equal(mesh)
    healed = time.monotonic()
    heal()
    wait_until(lambda: equal(mesh), HEAL_SECONDS, "one state after the heal")
    took = time.monotonic() - healed
    for name in NAMES:
        assert invites(mesh, name) >= written[0] | written[1]
    print(f"\nparted for {PARTED_SECONDS:g} s, equal {took:.1f} s after the heal")
    return took


def test_both_sides_of_a_cut_end_with_one_state(mesh, form):
    form(*NAMES)
    prepare(mesh)
    heal_seconds(mesh, lambda: mesh.partition(SIDES), mesh.heal)


@contextmanager
def seven_hosts():
    with Lab(Topology(sites=tuple(Site(name=name) for name in NAMES))) as lab:
        lab.start()
        lab.form()
        yield lab


@pytest.mark.root
@pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-")
def test_both_sides_of_a_split_network_end_with_one_state():
    with seven_hosts() as lab:
        prepare(lab.mesh)
        heal_seconds(
            lab.mesh,
            lambda: lab.network.split(SIDES[1]),
            lambda: lab.network.join(SIDES[1]),
        )
        wait_until(lambda: linked(lab.mesh), 30, "all links")
