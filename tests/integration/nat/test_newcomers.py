"""Every bootstrap is gone: newcomers and returning members get in, all can call."""

import time

import pytest

from fabric.core.errors import NoRoute
from sims.lab.measure import Pair, all_pairs, measure_pairs
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

FOUNDER = Site(name="founder")
"""The only bootstrap: the first token names nobody else."""
RELAY = Site(name="relay")
HOME = Site(name="home", kind=NatKind.CONE)
LATE = Site(name="late", kind=NatKind.SYMMETRIC)
SECONDS = 40.0


def pairs_of(lab, *dead):
    return all_pairs(host for host in lab.hosts if host not in dead)


def from_now(lab):
    return dict.fromkeys(lab.hosts, time.monotonic())


def invites(lab, host):
    return {row.subject for row in lab.client(host).trust() if row.kind == "invite"}


def left_relays(lab, one, other):
    """Whether neither plane of the pair uses one; the grace of the old is over."""
    kinds = lab.view(one, other).control
    return bool(kinds) and "relay" not in kinds


def test_a_newcomer_joins_by_an_invite_that_names_other_members(started, show):
    """The relay is of the founder's kind; at home the token's circuit leads through it.

    A token from before they joined names the founder alone, and says so.
    """
    lab = started(FOUNDER, RELAY, HOME, LATE)
    first = lab.form(["founder", "relay", "home"])
    pairs = [Pair("founder", "relay"), Pair("founder", "home")]
    check(measure_pairs(lab, pairs, from_now(lab), SECONDS))
    token = lab.client("founder").invite()
    for host in ("relay", "home"):
        wait_until(
            lambda host=host: invites(lab, host) == invites(lab, "founder"),
            SECONDS,
            f"{host} to hear of the invite",
        )
    lab.mesh.kill("founder")
    with pytest.raises(NoRoute, match="none of 1 members answers"):
        lab.client("late").join(first)
    lab.client("late").join(token)
    results = measure_pairs(lab, pairs_of(lab, "founder"), from_now(lab), SECONDS)
    show("a newcomer, all bootstraps dead", results)
    check(results)


def test_a_member_returns_to_peers_that_it_remembers(formed, show):
    lab, joined = formed(FOUNDER, RELAY, HOME, LATE)
    check(measure_pairs(lab, all_pairs(lab.hosts), joined, SECONDS))
    lab.mesh.kill("late")
    lab.mesh.kill("founder")
    lab.start(["late"])
    results = measure_pairs(lab, pairs_of(lab, "founder"), from_now(lab), SECONDS)
    show("a member that returns, all bootstraps dead", results)
    check(results)


def test_members_carry_what_no_relay_is_left_for(formed, show):
    """No public host is left; all reach one member, whose NAT lets in whom it knows."""
    between = Site(name="between", kind=NatKind.CONE_ADF)
    other = Site(name="other", kind=NatKind.SYMMETRIC)
    lab, joined = formed(FOUNDER, RELAY, between, HOME, LATE, other)
    check(measure_pairs(lab, all_pairs(lab.hosts), joined, SECONDS))
    for host in ("home", "late", "other"):
        wait_until(
            lambda host=host: left_relays(lab, "between", host),
            SECONDS,
            f"everything with {host} to leave its relay",
        )
    lab.mesh.kill("founder")
    lab.mesh.kill("relay")
    left = pairs_of(lab, "founder", "relay")
    results = measure_pairs(lab, left, from_now(lab), SECONDS)
    show("no public host is left", results)
    check(results)
