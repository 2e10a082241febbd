from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Generation, RoundReport
from fabric.jobs.rounds import STALL, RoundTable

JOB = JobId("j")
PEERS = tuple(PeerId(c) for c in "abcd")
GENERATION = Generation(JOB, 3, PEERS[0], PEERS, 2, "", (), "")


def table(rounds=5, patience=5.0):
    return RoundTable(GENERATION, rounds, patience, now=0.0)


D_CUTS = (("b", "d"), ("c", "d"))


def report(peer, holds, *, round=2, counter=3, tokens=10, loss=1.0, broken=()):
    tokens = tokens if peer in holds else 0
    return RoundReport(JOB, counter, round, tuple(holds), tokens, loss, tuple(broken))


def test_a_round_is_decided_as_soon_as_all_live_hold_everything():
    t = table()
    for peer in PEERS[:3]:
        t.report(peer, report(peer, PEERS), 1.0)
    assert t.decide(frozenset(PEERS), 1.0) is None
    t.report("d", report("d", PEERS), 2.0)
    closed = t.decide(frozenset(PEERS), 2.0)
    assert closed.decision.contributors == PEERS
    assert closed.decision.tokens == (10,) * 4
    assert (closed.decision.round, closed.decision.last, t.round) == (2, False, 3)
    assert closed.behind == frozenset()
    assert t.decide(frozenset(PEERS), 3.0) is None, "once per round"


def test_the_last_round_ends_the_run():
    t = table(rounds=3)
    for peer in PEERS:
        t.report(peer, report(peer, PEERS), 1.0)
    assert t.decide(frozenset(PEERS), 1.0).decision.last
    assert t.over


def test_a_slow_peer_is_left_out_after_patience_and_one_that_is_silent_is_behind():
    t = table()
    for peer in "ab":
        t.report(peer, report(peer, "ab"), 1.0)
    t.report("c", report("c", "ab"), 1.0)  # receives, but is not done itself
    assert t.deadline() == 5.0
    assert t.decide(frozenset(PEERS), 4.9) is None
    closed = t.decide(frozenset(PEERS), 5.0)
    assert closed.decision.contributors == ("a", "b")
    assert closed.behind == {"d"}


def test_patience_follows_the_measured_time():
    t = table()
    assert t.deadline() is None, "nobody is late while nobody is done"
    for peer, at in (("a", 10.0), ("b", 12.0), ("c", 20.0)):
        t.report(peer, report(peer, [peer]), at)
    assert t.deadline() == 24.0


def test_while_nothing_is_shared_a_working_link_is_waited_for():
    t = table()
    t.report("a", report("a", "a"), 1.0)
    t.report("b", report("b", "b"), 1.0)
    assert t.decide(frozenset("ab"), 1.0 + STALL * 5.0 - 0.1) is None
    closed = t.decide(frozenset("ab"), 1.0 + STALL * 5.0)
    assert (closed.decision.contributors, closed.behind) == (("a",), {"b"})


def test_behind_cut_links_the_largest_group_that_shares_decides():
    t = table()
    for peer, holds, broken in (("a", "a", "bcd"), ("b", "bc", "a"), ("c", "bc", "")):
        t.report(peer, report(peer, holds, broken=broken), 1.0)
    t.report("d", report("d", "d"), 1.0)
    live = frozenset(PEERS)
    assert t.decide(live, 4.9) is None, "not before the deadline"
    assert t.decide(live, 6.0) is None, "d may still get b's and c's"
    t.report("d", report("d", "d", broken="bc"), 7.0)
    assert t.cut_links(live) == (("a", "b"), ("a", "c"), ("a", "d"), *D_CUTS)
    assert t.cut_links(live - {"a"}) == D_CUTS
    closed = t.decide(live, 7.0)
    assert (closed.decision.contributors, closed.behind) == (("b", "c"), {"a", "d"})


def test_a_cut_off_peer_does_not_decide_while_the_others_work():
    """Its own contribution is the only one, and everybody else is merely slow."""
    t = table()
    t.report("a", report("a", "a"), 1.0)
    t.report("b", report("b", "c", broken="a"), 1.0)
    assert t.decide(frozenset("ab"), 6.0).decision.contributors == ("a",)
    t = table()
    t.report("c", report("c", "c"), 1.0)
    t.report("b", report("b", "a", broken="c"), 1.0)
    assert t.decide(frozenset("ab"), 90.0) is None, "c is dead, a and b still work"


@pytest.mark.parametrize("wrong", [{"round": 1}, {"round": 3}, {"counter": 2}])
def test_reports_of_other_epochs_and_rounds_are_refused(wrong):
    t = table()
    assert not t.report("a", report("a", PEERS, **wrong), 1.0)
    assert not t.report("x", report("x", PEERS), 1.0)
    assert t.reporters == frozenset()


def test_an_overtaken_report_does_not_shrink_what_a_peer_holds():
    t = table()
    t.report("a", report("a", "ab"), 1.0)
    t.report("a", report("a", "a"), 1.1)
    t.report("b", report("b", "ab", loss=math.nan), 1.2)
    closed = t.decide(frozenset("ab"), 1.2)
    assert closed.decision.contributors == ("a", "b")
    assert math.isfinite(closed.loss)


@settings(max_examples=80, deadline=None)
@given(
    reports=st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.sets(st.sampled_from("abcde")), st.floats(0, 30)
        ),
        max_size=12,
    ),
    live=st.sets(st.sampled_from("abcd"), min_size=1),
    wait=st.floats(0, 60),
)
def test_every_contributor_is_held_by_every_live_reporter(reports, live, wait):
    t, holds, done, now = table(), {}, set(), 0.0
    for peer, held, at in sorted(reports, key=lambda r: r[2]):
        now = at
        t.report(peer, report(peer, held), at)
        if holds.get(peer, set()) <= held & set("abcd"):
            holds[peer] = held & set("abcd")
            done |= {peer} & held
    closed = t.decide(frozenset(live), now + wait)
    reporters = live & holds.keys()
    if closed is None:
        return
    contributors = set(closed.decision.contributors)
    assert contributors
    assert contributors <= done
    group = live - closed.behind
    assert group <= reporters
    assert contributors == set.intersection(*(holds[p] for p in group)) & done
    if group != reporters:  # nobody would have decided otherwise
        assert not set.intersection(*(holds[p] for p in reporters)) & done
        sizes = {c: len({p for p in reporters if c in holds[p]}) for c in done}
        assert len(group) == max(sizes[c] for c in done & reporters)
