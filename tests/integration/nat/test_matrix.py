"""Every pair of NATs: can they call each other, directly where the NATs allow it?"""

import os
import time
from itertools import combinations

import pytest

from sims.lab.measure import DIRECT_PATHS, all_pairs, form_and_measure, measure_pairs
from sims.lab.namespaces import obstacle
from sims.lab.topology import NatKind, Site
from sims.local import wait_until
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
WHOLE_SECONDS = 90.0
NATED = [kind for kind in NatKind if kind is not NatKind.NONE]
HALF = len(NATED) // 2
PIECES = {
    "one half": NATED[:HALF] * 2,
    "other half": NATED[HALF:] * 2,
    "across": NATED,
}
"""Together every pair of kinds, also of a kind with itself; a mesh of all at once is
more than two cores carry."""


def sites_of(*kinds):
    return [
        Site(name=f"{kind.value}-{kinds[:at].count(kind)}", kind=kind)
        for at, kind in enumerate(kinds)
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
@pytest.mark.parametrize("piece", PIECES)
def test_whole_matrix(started, formed, show, piece, killed):
    sites = (FOUNDER, *VOLUNTEERS, *sites_of(*PIECES[piece]))
    if killed:
        results = without_founder(*formed(*sites), WHOLE_SECONDS)
    else:
        results = form_and_measure(started(*sites), WHOLE_SECONDS)
    state = "killed after the join" if killed else "alive"
    show(f"whole matrix, {piece}, all bootstraps {state}", results)
    check(results)


@pytest.mark.skipif(not WHOLE, reason="the whole matrix: make soak AREA=nat")
def test_ports_of_a_sequential_nat_are_foretold_once_it_is_quiet(formed):
    kinds = (NatKind.CONE, NatKind.CONE_REMAP, NatKind.RST, NatKind.CGNAT)
    lab, joined = formed(FOUNDER, *VOLUNTEERS, *sites_of(NatKind.SYMMETRIC_SEQ, *kinds))
    counting, *others = lab.hosts[1 + len(VOLUNTEERS) :]
    check(measure_pairs(lab, all_pairs(lab.hosts), joined, DOZEN_SECONDS))
    for other in others:
        wait_until(
            lambda other=other: lab.view(counting, other).path in DIRECT_PATHS,
            WHOLE_SECONDS,
            f"{counting} and {other} to be direct",
        )


def test_the_pieces_hold_every_pair_of_kinds():
    found = {
        frozenset(pair) for kinds in PIECES.values() for pair in combinations(kinds, 2)
    }
    assert len(found) == len(NATED) * (len(NATED) + 1) // 2
