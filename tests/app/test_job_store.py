"""What a job leaves behind and what it keeps alive, on real stores in virtual time."""

import pytest
import trio

from crdt_store.job_views import JOB_TTL_SECONDS, OVER_TTL_SECONDS
from crdt_store.memory_storage import MemoryStorage
from fabric.app.job_store import ReplicatedJobStore
from fabric.core.ids import JobId
from fabric.jobs.config import JobsConfig
from fabric.jobs.messages import Generation, generation_hash
from fabric.jobs.promises import PromiseRecord
from fabric.jobs.publisher_service import Publisher, renew_share
from fabric.jobs.retirement_service import CLOSED, keep_retiring, retire
from fabric.jobs.seat import Seat
from fabric.jobs.spec import CODEC, JobSpec, job_id
from fabric.jobs.states import JobState, JobStatus
from tests.crdt_store.conftest import Network, World
from tests.crdt_store.peers import Peers, until

HOUR = 3600.0


pytestmark = pytest.mark.slow


@pytest.fixture
def world():
    return World()


@pytest.fixture
async def peers(world, nursery):
    return Peers(world, Network(), nursery)


@pytest.fixture
async def mesh(peers, world):
    """Three members' stores, and their job stores."""
    stores = [await peers.open(signer) for signer in world.workers[:3]]
    return stores, [ReplicatedJobStore(store, peers.clock) for store in stores]


def job_by(signer):
    spec = JobSpec(submitter=signer.peer_id, nonce="n")
    return job_id(spec), spec


def seat_in(job, spec, signer, participants, *, leads=False):
    """The seat of ``signer`` in generation 7, which the first participant leads."""
    generation = Generation(job, 7, participants[0], participants, 0, "", (), "")
    record = PromiseRecord(7, generation_hash(generation), None, (), generation, ())
    seat = Seat(job, spec, signer, record=record, now=trio.current_time(), seed=1)
    seat._tenure.part.presides = leads  # a seat that restarted would not
    return seat


async def pass_time(world, seconds, *, step=12 * HOUR):
    """Let the clocks of all stores go on; periodic work is done meanwhile."""
    for _ in range(int(seconds / step)):
        world.now += step
        await trio.sleep(61)  # a period of the publisher, virtual


def writes_of(stores, prefix):
    return {
        entry.raw
        for store in stores
        for entry in store._replica.slots
        if entry.key.startswith(prefix)
    }


async def test_a_job_of_a_month_keeps_its_slots_though_the_submitter_left(
    autojump_clock, peers, world, mesh, nursery
):
    stores, jobs = mesh
    job, spec = job_by(world.workers[0])
    await jobs[0].put_spec(job, CODEC.encode(spec))
    members = tuple(signer.peer_id for signer in world.workers[1:3])
    for index in (1, 2):
        signer = world.workers[index]
        seat = seat_in(job, spec, signer, members, leads=index == 1)
        nursery.start_soon(Publisher(seat, jobs[index], JobsConfig()).run)
    await until(lambda: stores[2].jobs.spec(job) is not None)
    seen = {"j/": set(), "a/": set()}
    for _ in range(30):
        await pass_time(world, 24 * HOUR)
        for prefix, raws in seen.items():
            raws |= writes_of(stores, prefix)
    for store in stores:
        assert store.jobs.spec(job) == CODEC.encode(spec)
        assert store.assignments.get(job).counter == 7
        assert store.jobs.status(job) is not None
    assert stores[0].jobs.authors(job) == {members[0]}, "the coordinator's alone"
    specs = [raw for raw in seen["j/"] if spec.submitter.encode() in raw]
    assert len(specs) <= 1 + 30 * 2 / 7 + 1, "half a lifetime apart"
    assert len(seen["a/"]) <= 30 * 2 / 7 + 1


async def test_others_renew_the_spec_when_the_coordinator_is_gone(
    autojump_clock, peers, world, mesh, nursery
):
    stores, jobs = mesh
    job, spec = job_by(world.workers[0])
    await jobs[0].put_spec(job, CODEC.encode(spec))
    members = tuple(signer.peer_id for signer in world.workers[:3])
    for index in (1, 2):
        seat = seat_in(job, spec, world.workers[index], members)
        nursery.start_soon(Publisher(seat, jobs[index], JobsConfig()).run)
    await until(lambda: stores[2].jobs.spec(job) is not None)
    await pass_time(world, 2 * JOB_TTL_SECONDS)
    assert stores[0].jobs.spec(job) == CODEC.encode(spec)
    assert len(stores[0].jobs.authors(job)) == 1, "one at a time"


def test_the_shares_at_which_a_spec_is_renewed_are_apart(world):
    members = tuple(signer.peer_id for signer in world.workers[:3])
    generation = Generation(JobId("j"), 7, members[1], members, 0, "", (), "")
    submitter, stranger = world.owner.peer_id, world.stranger.peer_id
    shares = {p: renew_share(p, generation, submitter) for p in (*members, submitter)}
    assert max(shares, key=shares.get) == members[1]
    assert sorted(shares.values()) == sorted(set(shares.values()))
    assert 1 / 4 <= min(shares.values()) <= max(shares.values()) == 1 / 2
    assert min(shares, key=shares.get) == submitter
    assert renew_share(stranger, generation, submitter) == 0


async def test_a_thousand_jobs_leave_nothing(autojump_clock, peers, world, nursery):
    disk = MemoryStorage()
    store = await peers.open(world.workers[0], storage=disk)
    founding = store.num_entries()
    jobs = ReplicatedJobStore(store, peers.clock)
    names = []
    for number in range(1000):
        spec = JobSpec(submitter=world.workers[0].peer_id, nonce=str(number))
        names.append(job_id(spec))
        await jobs.put_spec(names[-1], CODEC.encode(spec))
        await jobs.save_promise(names[-1], 3, b"p" * 4096)
        await jobs.put_status(names[-1], JobStatus(state=JobState.DONE, counter=3))
    await retire(jobs, live=names[:1])
    held = disk.load_promises()
    assert held[names[0]].blob == b"p" * 4096, "its task may still promise"
    assert sum(len(promise.blob) for promise in held.values()) == 4096
    assert all(promise.counter == 3 for promise in held.values())
    assert jobs.promise(names[1]) == CLOSED

    nursery.start_soon(keep_retiring, jobs, {}, JobsConfig())
    await pass_time(world, JOB_TTL_SECONDS + 12 * HOUR)
    assert disk.load_promises() == {}
    assert jobs.specs() == {}
    assert jobs.status(names[5]) is not None, "an end is known for longer"
    await pass_time(world, OVER_TTL_SECONDS, step=24 * HOUR)
    assert store.num_entries() == founding
    await until(lambda: len(disk.load()) == founding)


async def test_a_promise_of_a_job_that_goes_on_is_kept(
    autojump_clock, peers, world, nursery
):
    """Also when its spec has run out here: others may have it still."""
    disk = MemoryStorage()
    store = await peers.open(world.workers[0], storage=disk)
    jobs = ReplicatedJobStore(store, peers.clock)
    job, spec = job_by(world.workers[0])
    await jobs.put_spec(job, CODEC.encode(spec))
    await jobs.save_promise(job, 5, b"promised")
    nursery.start_soon(keep_retiring, jobs, {}, JobsConfig())
    await pass_time(world, 2 * JOB_TTL_SECONDS)
    assert jobs.specs() == {}
    assert disk.load_promises()[job].blob == b"promised"
