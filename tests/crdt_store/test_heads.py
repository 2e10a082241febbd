"""Which checkpoints of a run stay, and what is left of those that do not."""

import trio

from crdt_store.views import CheckpointHead
from fabric.app.saved_states import HeadStates
from fabric.core.ids import JobId, PeerId
from fabric.jobs.spec import JobSpec, OuterSpec, TrainSpec
from tests.crdt_store.peers import until


def head(step, **other):
    root = f"{step:064x}"
    return CheckpointHead(root=root, bytes=1, round=step, writer="w", **other)


async def test_the_newest_steps_stay_and_a_writer_retires_its_own(
    peers, world, autojump_clock
):
    one, other = [await peers.open(signer) for signer in world.workers[:2]]
    for step in range(1, 8):
        writer = one if step % 2 else other
        await writer.heads.put("run", step, head(step, keep=3))
        with trio.fail_after(20):
            await until(lambda: one.state_hash() == other.state_hash())
    for store in (one, other):
        assert list(store.heads.newest("run")) == [7, 6, 5]
        assert store.heads.latest("run")[0] == 7
        assert store.heads.runs() == ["run"]
        # each retires its own when it writes, so one more may still be seen
        assert set(store.heads.all("run")) <= {4, 5, 6, 7}


async def test_without_a_bound_all_stay_and_pieces_come_later(
    peers, world, autojump_clock
):
    store = await peers.open(world.workers[0])
    for step in range(4):
        await store.heads.put("run", step, head(step))
    assert sorted(store.heads.newest("run")) == [0, 1, 2, 3]
    pieces = tuple(f"{n:064x}" for n in range(6))
    whole = head(3, erasure="4+2", pieces=pieces)
    await store.heads.put("run", 3, whole)
    assert store.heads.all("run")[3] == whole
    assert store.heads.newest("other") == {}


async def test_the_heads_of_a_jobs_own_peers_are_believed_before_those_of_others(
    peers, world, autojump_clock
):
    one, other = [await peers.open(signer) for signer in world.workers[:2]]
    me, stranger = (signer.peer_id for signer in world.workers[:2])
    job = JobId("ab" * 32)
    spec = JobSpec(train=TrainSpec(outer=OuterSpec(rounds=100)), submitter=me)
    states = HeadStates(PeerId("p"), one.heads, None, None)
    assert not states.rounds(job, spec, (me,))
    for step in (50, 400):
        await other.heads.put(job[:32], step, head(step))
    with trio.fail_after(20):
        await until(lambda: one.state_hash() == other.state_hash())
    assert states.rounds(job, spec, (me,)) == [50], "400 is beyond the job's end"
    for step in (4, 6):
        await one.heads.put(job[:32], step, head(step))
    assert states.rounds(job, spec, (me,)) == [6, 4]
    assert states.rounds(job, spec, (me, stranger)) == [50, 6, 4]
