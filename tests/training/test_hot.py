"""States kept in memory: within their budget, whole, and got back from others."""

import random
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from checkpoints.mesh.placement import Domain
from fabric.core.digest import block_digests, digest
from fabric.core.errors import IntegrityError, ResourceExhausted, Unavailable
from fabric.core.ids import JobId, PeerId
from fabric.core.signing import Ed25519Signer
from fabric.jobs.messages import Generation, StateHeld
from fabric.jobs.promises import Held
from fabric.jobs.restoration import Restored
from fabric.jobs.spec import CheckpointSpec, JobSpec, ModelSpec
from tests.dht.conftest import Mesh
from training import hot_service
from training.hot_keeper import HotKeeper
from training.hot_messages import HotClaim, HotHeld, sign_claim
from training.hot_service import METHOD_ASK, HotPorts, HotService, _best_first
from training.hot_store import HotState, HotStore
from training.messages import LoadHot, WriteHot
from training.resumption import state_bytes
from training.saved_states import SavedState

JOB = JobId("ab" * 32)
MODEL = ModelSpec(hidden_size=128, intermediate_size=256, num_layers=2)
SPEC = JobSpec(model=MODEL)
SIZE = state_bytes(MODEL)


def state(number, size=SIZE):
    data = random.Random(number).randbytes(size)
    name = digest(b"".join(block_digests(data))).hex()
    return HotState(JOB, number, name), data


def keep(store, number, size=SIZE):
    hot, data = state(number, size)
    with store.create(hot, size) as file:
        file.write(data)
    store.commit(hot, b"claim")
    return hot


def test_two_generations_are_kept_and_survive_their_process(tmp_path):
    store = HotStore(tmp_path, 10 * SIZE)
    for number in range(4):
        keep(store, number)
    assert [s.round for s in store.kept(JOB)] == [2, 3]
    again = HotStore(tmp_path, 10 * SIZE)
    assert again.kept(JOB) == store.kept(JOB)
    hot, data = state(3)
    with again.open(hot) as file:
        assert file.read() == data
    assert again.listing(hot.digest) == b"".join(block_digests(data))
    again.forget(JOB)
    assert not tmp_path.exists()
    with pytest.raises(Unavailable):
        again.open(hot)


def test_the_newest_state_stays_while_the_next_is_written(tmp_path):
    store = HotStore(tmp_path, 2 * SIZE)
    keep(store, 1)
    keep(store, 2)
    hot, data = state(3)
    with store.create(hot, SIZE) as file:
        assert [s.round for s in store.kept(JOB)] == [2]
        file.write(data[:-1])
    with pytest.raises(IntegrityError, match="not written whole"):
        store.commit(hot, b"claim")
    assert [s.round for s in store.kept(JOB)] == [2]
    store.create(hot, SIZE).close()
    assert [s.round for s in HotStore(tmp_path, 2 * SIZE).kept(JOB)] == [2]
    assert not list(tmp_path.glob("*.part")), "what was half written is gone"


def test_what_does_not_fit_is_refused_and_damage_is_noticed(tmp_path):
    store = HotStore(tmp_path, SIZE)
    with pytest.raises(ResourceExhausted, match="does not fit") as refusal:
        store.create(state(1)[0], SIZE + 1)
    assert "hot_memory_bytes" in refusal.value.next_step
    hot = keep(store, 1)
    path = tmp_path / hot.file_name
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    assert HotStore(tmp_path, SIZE).kept(JOB) == ()
    assert HotStore(tmp_path / "none", 0).jobs() == frozenset()


class World:
    """Hot services over stores on disk, joined by RPC in memory and real sockets."""

    def __init__(self, directory, nursery):
        self.directory, self.nursery = directory, nursery
        self.mesh = Mesh(directory / "content", nursery)
        self.signers, self.hot, self.stores = {}, {}, {}
        self.hosts, self.working, self.saved = {}, set(), []

    async def join(self, seed, host):
        signer = Ed25519Signer(bytes([seed]) * 32)
        peer = await self.mesh.join(signer.peer_id)
        self.signers[peer.own], self.hosts[peer.own] = signer, Domain(host, host)
        self.stores[peer.own] = HotStore(self.directory / f"hot{seed}", 10 * SIZE)
        ports = HotPorts(
            peer,
            peer,
            lambda: {p: self.hosts[p] for p in self.mesh.peers},
            spec_of=lambda job: SPEC if job == JOB else None,
            works=lambda job: peer.own in self.working,
            saved=self,
        )
        self.hot[peer.own] = HotService(signer, self.stores[peer.own], ports)
        await self.nursery.start(self.hot[peer.own].run)
        return peer.own

    # as SavedStates
    def rounds(self, job, spec, participants):
        return [number for number, _ in self.saved]

    @asynccontextmanager
    async def opened(self, job, spec, participants):
        number, path = max(self.saved)
        yield SavedState(path, number, "root")

    async def write(self, peer, number, participants):
        hot, data = state(number)
        file = await self.hot[peer].begin(hot, SPEC)
        with file:
            file.write(data)
        assert await self.hot[peer].finish(hot, SPEC, tuple(participants))
        return hot

    async def until(self, condition):
        with trio.fail_after(60):
            while not condition():  # noqa: ASYNC110 - any condition
                await trio.sleep(0.02)


@pytest.fixture
async def world(tmp_path):
    async with trio.open_nursery() as nursery:
        world = World(tmp_path, nursery)
        yield world
        world.mesh.close()
        nursery.cancel_scope.cancel()


async def test_a_lone_participant_gets_a_buddy_on_another_host(world):
    me = await world.join(1, "here")
    same, far = await world.join(2, "here"), await world.join(3, "there")
    for number in (5, 6, 7):
        await world.write(me, number, [me])
        wanted = Held(number, state(number)[0].digest, has_state=True)
        await world.until(lambda w=wanted: world.hot[far].newest(JOB) == w)
    assert world.hot[same].newest(JOB) is None
    assert len(world.stores[far].kept(JOB)) == 2

    # the machine is lost with its memory: a new start gets the state back
    world.stores[me].forget(JOB)
    found = await world.hot[me].recall(JOB, (me,))
    assert found == world.hot[me].newest(JOB) == world.hot[far].newest(JOB)
    await world.hot[far].forget(JOB)
    assert world.hot[far].newest(JOB) is None


async def test_participants_on_two_hosts_are_each_others_buddies(world):
    one, other = await world.join(1, "a"), await world.join(2, "b")
    outside = await world.join(3, "c")
    for peer in (one, other):
        await world.write(peer, 3, [one, other])
    await trio.sleep(0.3)
    assert world.hot[outside].newest(JOB) is None
    world.stores[one].forget(JOB)
    world.working.add(other)
    assert await world.hot[one].recall(JOB, (one, other)) is None, "a newer one lives"
    world.working.clear()
    assert (await world.hot[one].recall(JOB, (one, other))).round == 3


async def test_one_who_may_keep_the_only_state_is_waited_for(world, monkeypatch):
    """It takes longer to be reached, and without it the job would begin anew."""
    monkeypatch.setattr(hot_service, "ASK_SECONDS", 0.1)
    me, buddy = await world.join(1, "here"), await world.join(2, "there")
    await world.join(3, "here")
    await world.write(me, 4, [me])
    await world.until(lambda: world.hot[buddy].newest(JOB))
    world.stores[me].forget(JOB)
    handlers, asked = world.mesh.peers[buddy].handlers, []
    answer = handlers[METHOD_ASK]

    async def late(sender, request):
        asked.append(sender)
        if len(asked) < 3:
            raise Unavailable("not yet")
        return await answer(sender, request)

    handlers[METHOD_ASK] = late
    assert (await world.hot[me].recall(JOB, (me,))).round == 4


async def test_nobody_is_believed_without_a_participants_signature(world):
    me, liar = await world.join(1, "a"), await world.join(2, "b")
    await world.write(liar, 900, [liar])
    assert await world.hot[me].recall(JOB, (me,)) is None
    assert world.stores[me].kept(JOB) == ()


async def test_a_checkpoint_becomes_the_state_that_workers_know_by_its_name(
    world, tmp_path
):
    torch = pytest.importorskip("torch")
    from training.worker.engine import NativeEngine
    from training.worker.outer import OuterState, state_blocks, state_digest
    from training.worker.save import save_checkpoint

    me = await world.join(1, "a")
    hot = world.hot[me]
    assert hot.checkpoint(JOB, SPEC, (me,)) == 0
    engine = NativeEngine(MODEL, SPEC.train)
    random = torch.Generator().manual_seed(3)
    flat = [torch.randn(engine.flat.shape, generator=random) for _ in range(2)]
    state = OuterState(7, *flat)
    save_checkpoint(tmp_path / "saved", SPEC, engine, state)
    world.saved = [(7, tmp_path / "saved" / "step-7")]
    assert hot.checkpoint(JOB, SPEC, (me,)) == 7
    world.stores[me]._max_bytes = SIZE - 1
    with pytest.raises(ResourceExhausted, match="does not fit"):
        await hot.restore(JOB, SPEC, (me,))
    world.stores[me]._max_bytes = 2 * SIZE
    restored = await hot.restore(JOB, SPEC, (me,))
    name = state_digest(state_blocks(state.to_bytes()))
    assert restored == Restored(Held(7, name, has_state=True), "root")
    assert restored.held == hot.newest(JOB)
    _, file = hot.open(JOB, name)
    with file:
        assert file.read() == bytes(state.to_bytes())
    assert not list((tmp_path / "hot1").glob("*.part"))


def test_the_newest_claim_that_most_keep_comes_first():
    signer, other = (Ed25519Signer(bytes([n]) * 32) for n in (1, 2))
    claims = [HotClaim(JOB, n, f"{n:064x}", SIZE) for n in range(3)]

    def held(*numbers, by=signer):
        return HotHeld(tuple(sign_claim(by, claims[n]) for n in numbers))

    foreign = msgspec.structs.replace(claims[2], job="cd" * 32)
    answers = {
        PeerId("a"): held(0, 1),
        PeerId("b"): held(1),
        PeerId("c"): HotHeld((sign_claim(signer, foreign),)),
        PeerId("d"): held(2, by=other),
    }
    order = _best_first(JOB, answers, [signer.peer_id])
    assert order == [(claims[1], ["a", "b"]), (claims[0], ["a"])]


class Kept:
    """A HotKeeping that only notes."""

    def __init__(self, tmp_path):
        self.path, self.kept, self.finished, self.aborted = tmp_path / "f", {}, [], []
        self.room = True

    async def begin(self, hot, spec):
        return self.path.open("wb", buffering=0) if self.room else None

    async def finish(self, hot, spec, participants):
        self.finished.append(hot.round)
        self.kept[hot.digest] = hot
        return True

    def abort(self, hot):
        self.aborted.append(hot.round)

    def open(self, job, name):
        return (self.kept[name], self.path.open("rb", 0)) if name in self.kept else None

    def damaged(self, name):
        del self.kept[name]


def generation(name, at):
    return Generation(JOB, 1, "a", ("a",), at, name, ("a",), "")


async def test_one_state_is_written_at_a_time_and_the_newest_next(tmp_path):
    told = []

    async def tell(command, file):
        file.close()
        told.append(command)

    kept = Kept(tmp_path)
    spec = JobSpec(checkpoint=CheckpointSpec(hot_every_rounds=2))
    keeper = HotKeeper(kept, JOB, spec, tell)
    for number in range(9):
        await keeper.held(StateHeld(JOB, 1, number, f"{number:064x}" if number else ""))
    assert told == [WriteHot(f"{2:064x}")], "round 0 is derived, odd ones are left out"
    assert await keeper.written(f"{2:064x}") == 2
    assert told[1:] == [WriteHot(f"{8:064x}")], "those in between are left out"
    await keeper.failed(f"{8:064x}")
    assert kept.aborted == [8]
    kept.room = False
    await keeper.held(StateHeld(JOB, 1, 10, f"{10:064x}"))
    assert len(told) == 2
    await keeper.enter(generation(f"{10:064x}", 10))
    assert len(told) == 2, "the worker holds it"
    fresh = HotKeeper(kept, JOB, spec, tell)
    await fresh.enter(generation(f"{2:064x}", 2))
    assert told[2:] == [LoadHot(2, f"{2:064x}")]
    await fresh.failed(f"{2:064x}")
    assert kept.kept == {}
