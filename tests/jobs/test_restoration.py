"""A job whose states are all gone goes on from its newest checkpoint, or says why."""

from __future__ import annotations

import pytest

from fabric.core.digest import hex_digest
from fabric.jobs.effects import Restore
from fabric.jobs.promises import Held
from fabric.jobs.restoration import Restored
from fabric.jobs.runner import RunnerFailed
from fabric.jobs.states import JobState, Pause


@pytest.fixture
def saving(make_net):
    """Return a net in which the state of round 2 is saved, and what it was."""

    class Saving(make_net):
        refusals = 0
        saved_state = ""

        def perform(self, peer, effect):
            if isinstance(effect, Restore):
                self.later(0.5, lambda: self.bring(peer))
            super().perform(peer, effect)

        def bring(self, peer):
            if self.refusals:
                self.refusals -= 1
                outcome = Pause("E_NO_CONTENT", "nobody has it", "bring them back")
            else:
                self.sums[peer].states = {2: self.saved_state}
                name = hex_digest(self.saved_state.encode())
                outcome = Restored(Held(2, name, has_state=True), "root")
            self.seats[peer].restoration.ended(outcome)
            self.pump(peer)

        def know(self, checkpoint):
            for seat in self.alive():
                seat.restoration.know(checkpoint, 4)

        def kinds(self, *wanted):
            return [e.kind for _, _, e in self.log if e.kind in wanted]

    def saving(*, peers=3, rounds=6):
        net = Saving(peers, rounds=rounds, min_peers=peers)
        for index in range(peers):
            net.start(index)

        def third():
            return any(r == 3 for _, r in net.decisions)

        assert net.run(60, lambda: any(2 in s.states for s in net.sums.values()))
        net.saved_state = next(s.states[2] for s in net.sums.values() if 2 in s.states)
        assert net.run(60, third)
        return net

    return saving


def restart_all(net, checkpoint):
    for index in range(len(net.ids)):
        net.kill(index)
    net.run(20)
    for index in range(len(net.ids)):
        net.start(index)
    net.know(checkpoint)


@pytest.mark.parametrize("knows", [0, 1, 2])
def test_nobody_begins_anew_while_one_peer_knows_of_a_checkpoint(saving, knows):
    """What the others hold of the replicated state may be older."""
    net = saving()
    restart_all(net, 0)
    net.seats[net.ids[knows]].restoration.know(2, 4)
    before = max(net.commits)
    net.run(15)
    net.know(2)
    assert net.run(120, net.all_done)
    bases = {g.base_round for c, g in net.commits.items() if c > before}
    assert 2 in bases
    assert 0 not in bases


def test_all_restarted_peers_go_on_from_the_newest_checkpoint(saving):
    net = saving()
    net.refusals = 2
    restart_all(net, 2)
    before = max(net.commits)
    assert net.run(120, net.all_done)
    assert len(net.final_states()) == 1
    bases = {g.base_round for c, g in net.commits.items() if c > before}
    assert 0 not in bases
    assert 2 in bases
    told = net.kinds("state_lost", "restore_failed", "restored", "restarted")
    assert told == ["state_lost", "restore_failed"] * 2 + ["state_lost", "restored"]


def test_a_job_waits_for_a_checkpoint_that_cannot_be_had(saving):
    net = saving()
    net.refusals = 1000
    restart_all(net, 2)
    before = max(net.commits)
    assert not net.run(120, lambda: max(net.commits) > before)
    pauses = [seat.pause(net.now) for seat in net.alive()]
    assert "E_NO_CONTENT" in {pause.code for pause in pauses if pause}
    net.refusals = 0
    assert net.run(120, net.all_done)


def test_a_job_without_a_checkpoint_starts_anew_and_says_so(saving):
    net = saving()
    restart_all(net, 0)
    assert net.run(120, net.all_done)
    assert len(net.final_states()) == 1
    told = [e.facts for _, _, e in net.log if e.kind == "restarted"]
    assert told
    assert {facts["round"] for facts in told} == {0}
    assert "round 4" in told[0]["reason"]


@pytest.mark.parametrize("peers", [1, 3])
def test_when_all_workers_fail_the_checkpoint_is_taken(saving, peers):
    net = saving(peers=peers)
    net.know(2)
    before = max(net.commits)
    for peer, seat in net.seats.items():
        net.sums[peer].states = {0: "initial"}
        seat.event(RunnerFailed("E_WORKER", "killed"), net.now)
        net.pump(peer)
    assert net.run(120, net.all_done)
    bases = {g.base_round for c, g in net.commits.items() if c > before}
    assert bases == {2}
    assert "restored" in net.kinds("restored")


def test_a_worker_that_fails_again_and_again_ends_the_job(saving):
    net = saving(peers=1)
    net.know(2)
    seat = net.seats[net.ids[0]]

    def fails():
        if net.sums[seat.me].generation is not None:
            net.sums[seat.me].states = {0: "initial"}
            seat.event(RunnerFailed("E_WORKER", "killed"), net.now)
            net.pump(seat.me)
        return seat.over

    assert net.run(200, fails)
    assert seat.state is JobState.FAILED
    assert "E_WORKER" in seat.reason
