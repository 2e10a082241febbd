from __future__ import annotations

import pytest

from fabric.jobs.messages import Commit, Propose

PATIENCE = 4.0


def started(make_net, n=4, **kwargs):
    net = make_net(n, **{"min_peers": n, **kwargs})
    for i in range(n):
        net.start(i)
    return net


def test_four_peers_train_to_one_digest(make_net):
    net = started(make_net)
    assert net.run(60, net.all_done)
    assert len(net.final_states()) == 1
    coordinator = net.seats[net.ids[0]]
    facts = coordinator.ledger.facts(net.now)
    assert facts["tokens"] == 3 * 4 * 100
    assert facts["peers_equal"] == 4
    assert facts["checkpoint"]
    assert max(net.commits) == 1, "no generation beyond the first was needed"


def test_a_killed_participant_is_replaced_by_a_generation_without_it(make_net):
    net = started(make_net, rounds=6)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.kill(2)
    assert net.run(60, net.all_done)
    assert len(net.final_states()) == 1
    last = net.commits[max(net.commits)]
    assert net.ids[2] not in last.participants
    assert len(last.participants) == 3


def test_a_killed_coordinator_is_succeeded(make_net):
    net = started(make_net, rounds=6)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.kill(0)
    assert net.run(60, net.all_done)
    assert len(net.final_states()) == 1
    last = net.commits[max(net.commits)]
    assert last.coordinator != net.ids[0]
    assert last.base_round >= 2, "rounds that were decided are not lost"


def test_a_newcomer_joins_at_a_round_boundary_and_fetches(make_net):
    net = make_net(5, min_peers=4, rounds=6)
    for i in range(4):
        net.start(i)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.start(4)
    assert net.run(60, net.all_done)
    assert len(net.final_states()) == 1
    last = net.commits[max(net.commits)]
    assert net.ids[4] in last.participants
    assert last.sources
    assert net.ids[4] not in last.sources


def test_a_newcomer_that_asked_the_dead_asks_the_successor_at_once(make_net):
    """A short job would be over when the patience with the dead one is."""
    net = make_net(5, min_peers=4, rounds=60)
    for i in range(4):
        net.start(i)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    epoch, newcomer = max(net.commits), net.ids[4]
    net.kill(0)
    net.run(0.9 * PATIENCE)
    net.start(4)
    assert net.run(30, lambda: max(net.commits) > epoch)
    assert newcomer not in net.commits[max(net.commits)].participants
    assert net.run(
        0.5 * PATIENCE, lambda: newcomer in net.commits[max(net.commits)].participants
    )


@pytest.mark.parametrize("late", [0.2, 0.5, 1.5, 3.0])
def test_a_newcomer_that_catches_up_does_not_stop_the_run(make_net, late):
    """Its first round is decided late without it; then it applies that decision."""
    net = make_net(5, min_peers=4, rounds=6)
    for i in range(4):
        net.start(i)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    newcomer = net.ids[4]
    net.start(4)
    net.sums[newcomer].fetch_seconds = PATIENCE + late
    assert net.run(30, lambda: newcomer in net.commits[max(net.commits)].participants)
    assert net.run(
        60, lambda: any(newcomer in d.contributors for d in net.decisions.values())
    )
    assert net.run(60, net.all_done)
    assert len(net.final_states()) == 1


def cut_off(net, index):
    for other in range(len(net.ids)):
        if other != index:
            net.cut(index, other)


@pytest.mark.parametrize("tells", [True, False])
def test_a_worker_that_reaches_no_other_holds_nobody_up(make_net, tells):
    net = started(make_net, rounds=4)
    net.tells_cuts = tells
    assert net.run(30, lambda: any(r == 0 for _, r in net.decisions))
    cut_off(net, 2)
    if tells:
        coordinator = net.seats[net.ids[0]]
        assert net.run(20, lambda: coordinator.pause(net.now) is not None)
        pause = coordinator.pause(net.now)
        assert pause.code == "worker_link_cut"
        assert net.ids[2][-8:] in pause.reason
    assert net.run(400, net.all_done)
    assert net.ids[2] in net.commits[max(net.commits)].participants
    facts = net.seats[net.ids[0]].ledger.facts(net.now)
    assert (facts["peers_equal"], facts["peers_behind"]) == (3, 1)


def test_two_workers_that_lose_each_other_for_a_while_end_equal(make_net):
    net = started(make_net, n=2, rounds=5)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.cut(0, 1)
    assert net.run(60, lambda: any(r == 3 for _, r in net.decisions))
    net.cuts.clear()
    assert net.run(120, net.all_done)
    assert len(net.final_states()) == 1


def test_a_slow_transfer_is_waited_for(make_net):
    """Past every deadline, but no end calls the link broken."""
    net = started(make_net, rounds=3)
    net.tells_cuts = False
    for one, other in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)):
        net.cut(one, other)
    net.run(6 * PATIENCE)
    assert not net.decisions
    net.cuts.clear()
    assert net.run(30, net.all_done)
    assert max(net.commits) == 1
    assert len(net.final_states()) == 1


def test_a_wrong_state_is_counted_and_fetched_again(make_net):
    net = started(make_net, rounds=5)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.sums[net.ids[2]].corrupt = True
    assert net.run(60, net.all_done)
    assert net.diverged == 1
    assert [e.kind for _, _, e in net.log].count("diverged") == 1
    generation = net.commits[2]
    assert net.ids[2] in generation.participants
    assert net.ids[2] not in generation.sources, "it fetches from the others"
    assert max(net.commits) == 2
    assert len(net.final_states()) == 1


def test_a_wrong_last_state_is_fetched_again_before_the_end(make_net):
    net = started(make_net, rounds=2)
    assert net.run(30, lambda: any(r == 0 for _, r in net.decisions))
    net.run(0.5)
    net.sums[net.ids[1]].corrupt = True
    assert net.run(60, net.all_done)
    assert net.diverged == 1
    assert len(net.final_states()) == 1
    assert net.seats[net.ids[0]].ledger.facts(net.now)["peers_equal"] == 4


def test_a_minority_pauses_and_resumes_after_the_heal(make_net):
    net = started(make_net, rounds=8)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.partition((0, 1), (2, 3))
    net.run(25)
    decided = len(net.decisions)
    net.run(10)
    assert len(net.decisions) == decided, "nobody has a majority of four"
    for i in range(4):  # three have no majority, one hears it from its coordinator
        pause = net.seats[net.ids[i]].pause(net.now)
        assert pause is not None
        assert pause.code == "no_quorum"
        assert pause.next_step
    net.heal()
    assert net.run(90, net.all_done)
    assert len(net.final_states()) == 1


def test_a_slow_peer_is_left_out_of_rounds_but_not_expelled(make_net):
    net = started(make_net, rounds=4)
    net.sums[net.ids[3]].speed = 60.0
    assert net.run(200, net.all_done)
    assert len(net.final_states()) == 1
    assert all(net.ids[3] in g.participants for c, g in net.commits.items() if c)
    assert all(net.ids[3] not in d.contributors for d in net.decisions.values())


def test_a_restarted_participant_fetches_and_goes_on(make_net):
    net = started(make_net, rounds=6)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.kill(1)
    net.run(0.5)
    net.start(1)
    assert net.run(90, net.all_done)
    assert len(net.final_states()) == 1
    assert len(net.commits[max(net.commits)].participants) == 4


def test_a_restarted_coordinator_takes_a_new_epoch(make_net):
    net = started(make_net, rounds=6)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    epoch = max(net.commits)
    net.kill(0)
    net.run(0.5)
    net.start(0)
    assert net.run(90, net.all_done)
    assert max(net.commits) > epoch
    assert len(net.final_states()) == 1


def test_of_two_one_goes_on_with_a_witness(make_net):
    net = make_net(3, min_peers=2, rounds=6)
    net.aloof.add(net.ids[2])
    for i in range(3):
        net.start(i)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    assert net.commits[1].witness == net.ids[2]
    net.kill(0)
    assert net.run(60, lambda: net.seats[net.ids[1]].state.value == "done")


def test_of_two_one_without_a_witness_pauses(make_net):
    net = started(make_net, n=2, rounds=6)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.kill(1)
    net.run(30)
    pause = net.seats[net.ids[0]].pause(net.now)
    assert pause is not None
    assert pause.code == "no_quorum"
    assert net.ids[1][-8:] in pause.reason


def test_a_partition_in_the_middle_of_a_hand_over_yields_one_epoch_each(make_net):
    """The successor's commit reaches nobody: both sides must not reuse its epoch."""
    net = started(make_net, n=5, rounds=8)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    epoch = max(net.commits)
    net.kill(0)
    cut = False

    def cut_commits(sender, peer, message):
        nonlocal cut
        if (
            isinstance(message, Commit)
            and message.generation.counter > epoch
            and not cut
        ):
            cut = True
            rest = tuple(i for i in range(1, 5) if net.ids[i] != sender)
            net.partition((net.ids.index(sender),), rest)
        return not isinstance(message, Commit) or not cut or net.linked(sender, peer)

    net.before_deliver = cut_commits
    assert net.run(60, lambda: cut)
    net.run(40)
    committed = {s.committed.counter for s in net.alive()}
    net.heal()
    net.start(0)
    assert net.run(120, net.all_done), committed
    assert len(net.final_states()) == 1


def test_a_partition_between_promise_and_commit_yields_one_epoch_each(make_net):
    net = started(make_net, n=5, rounds=8)
    assert net.run(30, lambda: any(r == 1 for _, r in net.decisions))
    net.kill(0)
    epoch = max(net.commits)
    cut = []

    def cut_proposals(sender, peer, message):
        if (
            isinstance(message, Propose)
            and message.generation.counter > epoch
            and len(cut) < 2
        ):
            cut.append(peer)
            if len(cut) == 2:
                net.partition((1, 2), (3, 4))
        return True

    net.before_deliver = cut_proposals
    net.run(40)
    assert cut
    net.heal()
    net.start(0)
    assert net.run(120, net.all_done)
    assert len(net.final_states()) == 1
