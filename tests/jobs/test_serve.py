"""A serve job: one peer per stage, a standing joiner for whoever is lost."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from fabric.jobs.messages import Generation
from fabric.jobs.spec import ServeSpec, job_id


@pytest.fixture
def serving(make_net):
    """Return a net of ``n`` daemons that all want a place in a chain of stages."""

    def start(n, stages=3):
        net = make_net(n, min_peers=1)
        serve = ServeSpec(stages=stages, checkpoint="root")
        net.spec = replace(net.spec, kind="serve", serve=serve)
        net.job = job_id(net.spec)
        for index in range(n):
            net.start(index)
        return net

    return start


def newest(net) -> Generation:
    return net.commits[max(net.commits)]


def placed(net, stages=3):
    """Whether every stage has a living peer that knows its place."""
    if not net.commits:
        return False
    generation = newest(net)
    peers = [p for p in generation.participants if p in net.seats]
    knows = [net.seats[p].committed == generation for p in peers]
    return len(peers) == stages and all(knows)


def test_every_stage_gets_a_peer_and_the_rest_stand_by(serving):
    net = serving(5)
    assert net.run(30, lambda: placed(net))
    counter = newest(net).counter
    net.run(60)
    assert newest(net).counter == counter, "standing joiners disturb nobody"
    working = {p for p, sums in net.sums.items() if sums.generation is not None}
    assert working == set(newest(net).participants)
    assert not net.decisions
    assert {s.state.value for s in net.alive()} <= {"running", "queued"}


def test_too_few_peers_for_the_stages_wait_and_say_so(serving):
    net = serving(2)
    net.run(30)
    pause = net.seats[net.ids[0]].pause(net.now)
    assert (pause.code, pause.reason) == ("waiting_for_peers", "2 of 3 peers are there")


@pytest.mark.parametrize("coordinator", [True, False])
def test_a_lost_stage_is_replaced_by_a_standing_joiner(serving, coordinator):
    net = serving(4)
    assert net.run(30, lambda: placed(net))
    before = newest(net)
    lost = before.coordinator
    if not coordinator:
        lost = next(p for p in before.participants if p != before.coordinator)
    net.kill(net.ids.index(lost))
    assert net.run(60, lambda: placed(net))
    assert set(newest(net).participants) == set(net.ids) - {lost}


def test_a_vacant_stage_waits_for_a_newcomer(serving):
    net = serving(3)
    assert net.run(30, lambda: placed(net))
    lost = next(p for p in newest(net).participants if p != newest(net).coordinator)
    net.kill(net.ids.index(lost))
    assert net.run(60, lambda: len(newest(net).participants) == 2)
    net.start(net.ids.index(lost))
    assert net.run(60, lambda: placed(net))


def test_a_leaving_stage_is_replaced(serving):
    net = serving(4)
    assert net.run(30, lambda: placed(net))
    leaver = next(p for p in newest(net).participants if p != newest(net).coordinator)
    net.aloof.add(leaver)
    net.seats[leaver].leave(net.now)
    assert net.run(60, lambda: leaver not in newest(net).participants)
    assert net.run(60, lambda: placed(net))
    assert net.sums[leaver].generation is None


def test_stop_ends_every_stage_and_the_peers_that_stood_by(serving):
    net = serving(4)
    assert net.run(30, lambda: placed(net))
    assert net.seats[newest(net).coordinator].stop(net.now)
    assert net.run(
        30, lambda: all(seat.state.value == "cancelled" for seat in net.alive())
    )
    assert all(sums.generation is None for sums in net.sums.values())
