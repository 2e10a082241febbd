"""Every pair of NATs: can they call each other, directly where the NATs allow it?"""

import os
import time

import pytest

from sims.lab.measure import all_pairs, form_and_measure, measure_pairs
from sims.lab.namespaces import obstacle
from sims.lab.topology import NatKind, Site
from tests.integration.nat.conftest import check

pytestmark = [
    pytest.mark.root,
    pytest.mark.scenario,
    pytest.mark.slow,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-"),
]

WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1
FOUNDER = Site(name="founder")
"""The only bootstrap: everybody joins through it."""
VOLUNTEERS = (Site(name="relay-0"), Site(name="relay-1"))
"""Public members that relay for others, found through the mesh."""
DOZEN_SECONDS = 40.0
WHOLE_SECONDS = 240.0


def sites_of(*kinds, copies=1):
    return [
        Site(name=f"{kind.value}-{i}", kind=kind)
        for kind in kinds
        for i in range(copies)
    ]


def without_founder(lab, joined, seconds):
    """Kill the bootstrap; return what becomes of all other pairs, timed from then."""
    lab.mesh.kill("founder")
    joined = dict.fromkeys(joined, time.monotonic())
    hosts = [host for host in lab.hosts if host != "founder"]
    return measure_pairs(lab, all_pairs(hosts), joined, seconds)


def test_a_dozen_pairs(started, show):
    lab = started(
        FOUNDER,
        *VOLUNTEERS[:1],
        Site(name="home", kind=NatKind.CONE, hosts=2),
        *sites_of(
            NatKind.CONE_REMAP,
            NatKind.RST,
            NatKind.CGNAT,
            NatKind.CONE_ADF,
            NatKind.SYMMETRIC,
            NatKind.ONLY_443,
        ),
    )
    results = form_and_measure(lab, DOZEN_SECONDS)
    show("all bootstraps alive", results)
    check(results)


def test_a_half_dozen_pairs_without_the_bootstrap(formed, show):
    kinds = (NatKind.CONE, NatKind.RST, NatKind.SYMMETRIC, NatKind.ONLY_443)
    lab, joined = formed(FOUNDER, *VOLUNTEERS, *sites_of(*kinds))
    results = without_founder(lab, joined, DOZEN_SECONDS)
    show("all bootstraps killed after the join", results)
    check(results)


@pytest.mark.skipif(not WHOLE, reason="the whole matrix: make soak AREA=nat")
@pytest.mark.parametrize("killed", [False, True], ids=["alive", "killed"])
def test_whole_matrix(started, formed, show, killed):
    kinds = [kind for kind in NatKind if kind is not NatKind.NONE]
    sites = (FOUNDER, *VOLUNTEERS, *sites_of(*kinds, copies=2))
    if killed:
        results = without_founder(*formed(*sites), WHOLE_SECONDS)
    else:
        results = form_and_measure(started(*sites), WHOLE_SECONDS)
    show(f"whole matrix, bootstrap {'killed' if killed else 'alive'}", results)
    check(results)
