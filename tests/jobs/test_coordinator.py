from __future__ import annotations

from fabric.core.ids import JobId, PeerId
from fabric.jobs.coordinator import FINAL_WAIT, Coordinator
from fabric.jobs.messages import Generation, RoundReport, StateHeld
from fabric.jobs.spec import FaultSpec, JobSpec, OuterSpec, TrainSpec

JOB = JobId("j")
PEERS = tuple(PeerId(c) for c in "abcd")
LIVE = frozenset(PEERS)
PATIENCE = 5.0


def coordinator(rounds=5, base=2):
    spec = JobSpec(
        train=TrainSpec(outer=OuterSpec(rounds=rounds)),
        fault=FaultSpec(patience_seconds=PATIENCE),
    )
    return Coordinator(Generation(JOB, 3, "a", PEERS, base, "x", (), ""), spec, 0.0)


def hold(role, peers, at, digest="x"):
    return sum(role.held(p, StateHeld(JOB, 3, at, digest)) for p in peers)


def decide_without_d(role, at):
    for peer in "abc":
        role.report(peer, RoundReport(JOB, 3, at, tuple("abc"), 1, 1.0), 1.0)
    return role.decide(LIVE, PATIENCE)


def test_a_round_boundary_ends_when_whom_it_waited_for_caught_up():
    role = coordinator()
    assert decide_without_d(role, 2).behind == {"d"}
    hold(role, "abc", 3)
    assert role.change_wanted(LIVE, 5.1)
    hold(role, "d", 3)
    assert not role.change_wanted(LIVE, 5.2)
    for peer in PEERS:
        role.report(peer, RoundReport(JOB, 3, 3, PEERS, 1, 1.0), 6.0)
    assert role.decide(LIVE, 6.0).decision.contributors == PEERS


def test_holding_an_older_state_is_no_catching_up():
    """It came late from a peer that cannot apply the decision any more."""
    role = coordinator()
    decide_without_d(role, 2)
    hold(role, "d", 2)
    hold(role, "abc", 3)
    assert role.change_wanted(LIVE, 5.1)


def test_the_result_of_most_stands_when_one_never_gets_it():
    role = coordinator(rounds=5, base=5)
    hold(role, "abc", 5)
    wait = FINAL_WAIT * PATIENCE
    assert not role.finishers(LIVE, wait - 0.1)
    assert role.finishers(LIVE, wait) == set("abc")
    assert role.finishers(LIVE - {"d"}, 0.1) == set("abc"), "all who live hold it"
    assert role.final_digest(frozenset("abc")) == "x"


def test_a_wrong_last_state_never_completes_before_it_is_fetched():
    role = coordinator(rounds=5, base=5)
    assert hold(role, "abc", 5) == 0
    assert hold(role, "d", 5, "y") == 1
    assert not role.finishers(LIVE, 1.0)
    assert role.change_wanted(LIVE, 1.0)
    assert hold(role, "d", 5) == 0
    assert role.finishers(LIVE, 1.1) == LIVE


def test_who_is_wrong_does_not_depend_on_who_speaks_first():
    for order in ("dabc", "adbc", "abdc", "abcd"):
        for wrong in "az":  # sorts below and above the right digest
            role = coordinator()
            count = [hold(role, p, 2, wrong if p == "d" else "x") for p in order]
            assert sum(count) == 1
            assert role.behind == {"d"}
            assert hold(role, "d", 3, "y") == 0, "known, and not judged again yet"
            assert role.behind == {"d"}
