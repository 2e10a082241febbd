"""Checkpoints while the rounds go on: who is asked, and what a fault costs."""

import msgspec
import pytest

from fabric.core.errors import ConfigError
from fabric.core.ids import JobId, PeerId
from fabric.jobs.promises import Held, genesis_of
from fabric.jobs.proposer import choose_base
from fabric.jobs.saving import Order, Saves
from fabric.jobs.spec import CheckpointSpec, JobSpec, OuterSpec, TrainSpec, spec_of
from tests.jobs.service_mesh import Mesh, spec

JOB = JobId("ab" * 32)
PEERS = frozenset(map(PeerId, "abc"))


def saves(every=2, rounds=10):
    train = TrainSpec(outer=OuterSpec(rounds=rounds))
    checkpoint = CheckpointSpec(every_rounds=every)
    return Saves(JOB, JobSpec(train=train, checkpoint=checkpoint))


def all_hold(round_number):
    return dict.fromkeys(PEERS, round_number)


def test_each_due_round_is_asked_of_one_holder_and_the_work_is_spread():
    asked = set()
    one = saves(rounds=100)
    for number in range(1, 100):
        one.decided(number, 0.0)
        assert one.next_order({}, PEERS, 0.0) is None, "nobody holds it yet"
        order = one.next_order(all_hold(number), PEERS, 0.0)
        assert (order is not None) == (number % 2 == 0)
        if order:
            assert one.next_order(all_hold(number), PEERS, 0.0) is None, "once"
            assert one.answered(order.peer, number, saved=True)
            asked.add(order.peer)
    assert asked == PEERS


def test_the_last_round_and_a_job_that_wants_none_are_left_alone():
    last = saves(every=2, rounds=4)
    last.decided(4, 0.0)
    assert last.next_order(all_hold(4), PEERS, 9.0) is None
    none = saves(every=0)
    none.decided(2, 0.0)
    assert none.next_order(all_hold(2), PEERS, 9.0) is None


def test_a_slow_save_leaves_out_those_in_between():
    one = saves(every=1)
    one.decided(1, 0.0)
    first = one.next_order(all_hold(1), PEERS, 0.0)
    for number in (2, 3):
        one.decided(number, 0.0)
        assert one.next_order(all_hold(number), PEERS, 9.0) is None
    assert one.answered(first.peer, 1, saved=True)
    assert one.next_order(all_hold(3), PEERS, 9.0).round == 3


def test_who_fails_is_lost_or_does_not_hold_it_is_passed_over():
    one = saves()
    one.decided(2, 0.0)
    first = one.next_order(all_hold(2), PEERS, 0.0)
    assert one.answered(first.peer, 2, saved=False)
    second = one.next_order(all_hold(2), PEERS, 0.0)
    assert second.peer != first.peer
    third = one.next_order(all_hold(2), PEERS - {second.peer}, 0.0)
    assert third.peer not in (first.peer, second.peer)
    assert not one.answered(second.peer, 2, saved=True), "its order was given up"
    assert not one.answered(third.peer, 4, saved=True)

    patient = saves()
    patient.decided(2, 0.0)
    others = dict.fromkeys(PEERS - {first.peer}, 2)
    assert patient.next_order(others, PEERS, 0.1) is None
    assert isinstance(patient.next_order(others, PEERS, 6.0), Order)


@pytest.fixture
async def mesh(nursery, tmp_path):
    mesh = Mesh(nursery, tmp_path)
    for index in range(3):
        await mesh.start(index)
    return mesh


async def test_a_job_saves_every_few_rounds_and_at_its_end(autojump_clock, mesh):
    given = msgspec.structs.replace(
        spec(rounds=7, min_peers=3), checkpoint=CheckpointSpec(every_rounds=3)
    )
    job = await mesh.services[0].submit(given)
    await mesh.until(lambda: mesh.all_are("done"))
    assert sorted(at for _, at in mesh.world.saved) == [3, 6, 7]
    assert sorted(mesh.world.checkpoints.values()) == [3, 6, 7]
    events = await mesh.services[0].events(job)
    assert [e.facts["round"] for e in events if e.kind == "checkpoint"] == [3, 6]
    view = mesh.services[0].jobs()[0]
    assert view.facts["checkpoint_round"] == 7


async def test_a_saver_that_dies_costs_one_checkpoint_at_most(autojump_clock, mesh):
    given = msgspec.structs.replace(
        spec(rounds=12, min_peers=3), checkpoint=CheckpointSpec(every_rounds=2)
    )
    await mesh.services[0].submit(given)
    await mesh.until(lambda: mesh.world.saved)
    saver, _ = mesh.world.saved[0]
    mesh.kill(mesh.ids.index(saver))
    await mesh.until(lambda: mesh.all_are("done"))
    rounds = {at for _, at in mesh.world.saved}
    assert rounds >= {12}
    assert len(rounds) >= 4


def test_a_resumed_job_begins_at_its_checkpoints_round():
    given = msgspec.structs.replace(
        JobSpec(submitter="me"), resume="ab" * 32, resume_round=7
    )
    assert genesis_of(JOB, given).base_round == 7
    nobody = {PeerId("a"): Held(), PeerId("b"): Held()}
    assert choose_base(nobody, 7) == (7, "", ())
    fresh = {PeerId("a"): Held(7, "", has_state=True), PeerId("b"): Held()}
    assert choose_base(fresh, 7) == (7, "", ())
    ahead = {**nobody, PeerId("c"): Held(8, "d", has_state=True)}
    assert choose_base(ahead, 7) == (8, "d", ("c",))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"resume": "xy"}, "resume"),
        ({"kind": "serve", "resume": "ab" * 32}, "cannot resume"),
        ({"checkpoint": {"erasure": "4"}}, "erasure"),
        ({"checkpoint": {"erasure": "30+30"}}, "more than 32"),
        ({"checkpoint": {"replicas": 0}}, "replicas"),
        ({"checkpoint": {"evry_rounds": 2}}, "unknown key"),
    ],
)
def test_impossible_wishes_are_refused(tree, reason):
    with pytest.raises(ConfigError, match=reason):
        spec_of(tree, "the test")
