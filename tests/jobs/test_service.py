from __future__ import annotations

import contextlib
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fabric.core.digest import hex_digest
from fabric.core.errors import (
    ConfigError,
    NoRoute,
    PeerTimeout,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.jobs.config import JobsConfig
from fabric.jobs.job_service import INTEGRITY_ERRORS
from fabric.jobs.messages import RoundReport, StateHeld
from fabric.jobs.ports import MemberFacts
from fabric.jobs.runner import CHECKPOINT_FACT, LINK_FACT, RunnerFailed, RunnerProgress
from fabric.jobs.service import JobsService
from fabric.jobs.spec import FaultSpec, JobSpec, OuterSpec, RequireSpec, TrainSpec
from fabric.jobs.states import STATUS, fold


class World:
    """The network, the replicated store and the runners' data plane, in one place."""

    def __init__(self):
        self.rpcs = {}
        self.groups = None
        self.specs = {}
        self.statuses = {}
        self.settings = ()
        self.assignments = {}
        self.changed = trio.Event()
        self.runners = {}
        self.checkpoints = {}
        self.speed = 1.0

    def linked(self, one, other):
        if one not in self.rpcs or other not in self.rpcs:
            return False
        return self.groups is None or any(one in g and other in g for g in self.groups)

    def wake(self):
        self.changed.set()
        self.changed = trio.Event()


class FakeRpc:
    def __init__(self, world, me):
        self.world, self.me, self.handlers = world, me, {}
        self.lost_peers = []

    def register(self, method, handler):
        async def wrapped(sender, raw):
            return handler(sender, raw)

        self.handlers[method] = wrapped

    def register_async(self, method, handler):
        self.handlers[method] = handler

    async def call(self, peer, method, request):
        await trio.sleep(0.01)
        if peer not in self.world.rpcs:
            raise NoRoute("connection refused")
        if not self.world.linked(self.me, peer):
            await trio.sleep(30)
            raise PeerTimeout("silence")
        handler = self.world.rpcs[peer].handlers.get(method)
        if handler is None:
            raise Unavailable("not serving")
        answer = await handler(self.me, request)
        await trio.sleep(0.01)
        if not self.world.linked(self.me, peer):
            raise PeerTimeout("silence")
        return answer

    def connected(self):
        return frozenset()

    def lost(self):
        send, receive = trio.open_memory_channel(64)
        self.lost_peers.append(send)
        return receive

    def break_connection(self, peer):
        for send in self.lost_peers:
            with contextlib.suppress(trio.BrokenResourceError):
                send.send_nowait(peer)

    def rtt_seconds(self, peer):
        return None


class FakeStore:
    def __init__(self, world, me, disk):
        self.world, self.me, self.disk = world, me, disk
        self.full = False

    def specs(self):
        return dict(self.world.specs)

    def status(self, job):
        slots = [raw for (j, _), raw in self.world.statuses.items() if j == job]
        return fold([STATUS.decode_untrusted(raw) for raw in slots])

    def settings(self, job, spec):
        return self.world.settings

    def coordinator(self, job):
        return self.world.assignments.get(job, (0, None))[1]

    async def put_spec(self, job, spec):
        self.world.specs[job] = spec
        self.world.wake()

    async def put_status(self, job, status):
        self.world.statuses[job, self.me] = STATUS.encode(status)
        self.world.wake()

    async def put_assignment(self, job, counter, coordinator, participants):
        self.world.assignments[job] = max(
            self.world.assignments.get(job, (0, "")), (counter, coordinator)
        )
        self.world.wake()

    def promise(self, job):
        return self.disk.get(job)

    async def save_promise(self, job, counter, blob):
        if self.full:
            raise ResourceExhausted("the disk is full")
        self.disk[job] = blob

    async def changed(self):
        await self.world.changed.wait()


def write_state(directory: Path, state: str):
    directory.mkdir(parents=True)
    (directory / "state").write_text(state)


class SumRunner:
    """Adds hashes: equal digests mean equal decisions applied in equal order."""

    def __init__(self, world, context):
        self.world, self.context, self.me = world, context, context.peer_id
        self.rounds = context.spec.train.outer.rounds
        self.send, self.events = trio.open_memory_channel(1000)
        self.states, self.round, self.holds = {0: "initial"}, 0, set()
        self.generation = self.decision = self.reported = None
        self.done_at = 0.0
        self.fetching = False

    async def apply(self, generation):
        base = generation.base_round
        fresh = self.generation is None or self.round != base
        self.generation, self.decision, self.reported = generation, None, None
        state = self.states.get(base)
        self.fetching = base > 0 and (
            state is None or hex_digest(state.encode()) != generation.state_digest
        )
        self.round = base
        if fresh:
            self.holds, self.done_at = set(), trio.current_time() + self.world.speed

    async def decide(self, decision):
        self.decision = decision

    async def save(self, directory: Path):
        write_state(directory, self.states[self.rounds])
        await self.send.send(RunnerProgress({CHECKPOINT_FACT: str(directory)}))

    async def next_event(self):
        return await self.events.receive()

    async def work(self):
        while True:
            await trio.sleep(0.1)
            if self.generation is not None:
                await (self.fetch() if self.fetching else self.step())

    async def held(self):
        state = hex_digest(self.states[self.round].encode())
        counter = self.generation.counter
        event = StateHeld(
            self.context.job, counter, self.round, state, validation_loss=1.5
        )
        await self.send.send(event)
        sent = {
            f"{LINK_FACT}{p}": 10 * self.round for p in self.generation.participants
        }
        await self.send.send(RunnerProgress(sent))

    async def fetch(self):
        for source in self.generation.sources:
            other = self.world.runners.get(source)
            state = other.states.get(self.generation.base_round) if other else None
            if state is None or not self.world.linked(self.me, source):
                continue
            if hex_digest(state.encode()) == self.generation.state_digest:
                self.states, self.fetching = {self.round: state}, False
                self.done_at = trio.current_time() + self.world.speed
                await self.held()
                return

    async def step(self):
        if self.round >= self.rounds:
            return
        if trio.current_time() >= self.done_at:
            self.holds.add(self.me)
        for peer in self.generation.participants:
            other = self.world.runners.get(peer)
            if other is None or not self.world.linked(self.me, peer):
                continue
            if other.round == self.round and peer in other.holds:
                self.holds.add(peer)
        if self.holds and self.holds != self.reported:
            self.reported = set(self.holds)
            counter, holds = self.generation.counter, tuple(sorted(self.holds))
            tokens = 100 if self.me in self.holds else 0
            await self.send.send(
                RoundReport(self.context.job, counter, self.round, holds, tokens, 2.0)
            )
        decision = self.decision
        if (
            decision
            and decision.round == self.round
            and set(decision.contributors) <= self.holds
        ):
            state = self.states[self.round] + "".join(decision.contributors)
            self.round += 1
            self.states[self.round] = hex_digest(state.encode())
            self.holds, self.reported, self.decision = set(), None, None
            self.done_at = trio.current_time() + self.world.speed
            await self.held()


def factory(world):
    @asynccontextmanager
    async def open_runner(context):
        runner = SumRunner(world, context)
        world.runners[context.peer_id] = runner
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.work)
            yield runner
            nursery.cancel_scope.cancel()

    return open_runner


class Mesh:
    """Daemons' jobs services in one virtual world; each can be killed and restarted."""

    def __init__(self, nursery, tmp_path):
        self.world, self.nursery, self.tmp_path = World(), nursery, tmp_path
        self.signers = [Ed25519Signer(bytes([i] * 32)) for i in range(1, 8)]
        self.ids = [s.peer_id for s in self.signers]
        self.disks = {i: {} for i in range(7)}
        self.services, self.scopes, self.stores, self.counters = {}, {}, {}, {}
        self.members = {}

    async def start(self, index):
        me = self.ids[index]
        rpc = self.world.rpcs[me] = FakeRpc(self.world, me)
        self.members[me] = MemberFacts(memory_bytes=1 << 30)
        self.stores[index] = FakeStore(self.world, me, self.disks[index])
        self.counters[index] = Counters()
        service = JobsService(
            JobsConfig(),
            signer=self.signers[index],
            rpc=rpc,
            store=self.stores[index],
            runners={"train": factory(self.world)},
            members=lambda: self.members,
            scratch_root=self.tmp_path / str(index),
            on_checkpoint=self.on_checkpoint,
            counters=self.counters[index],
            clock=trio.current_time,
        )
        self.services[index] = service
        scope = self.scopes[index] = trio.CancelScope()

        async def run(task_status):
            with scope:
                await service.run(task_status=task_status)

        await self.nursery.start(run)

    def kill(self, index):
        self.scopes[index].cancel()
        me = self.ids[index]
        del self.world.rpcs[me], self.members[me], self.services[index]
        self.world.runners.pop(me, None)
        for rpc in self.world.rpcs.values():
            rpc.break_connection(me)

    async def on_checkpoint(self, job, directory, round):
        root = hex_digest((directory / "state").read_bytes())
        self.world.checkpoints[root] = round
        return root

    async def until(self, condition, seconds=200.0):
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 - virtual time
                await trio.sleep(0.1)

    def views(self):
        return {i: s.jobs()[0] for i, s in self.services.items() if s.jobs()}

    def all_are(self, state):
        return all(view.state == state for view in self.views().values())

    def decided(self, rounds):
        return lambda: any(v.round >= rounds for v in self.views().values())

    def check_equal(self, job):
        view = next(iter(self.views().values()))
        done = [v for v in self.views().values() if v.facts.get("checkpoint")]
        assert done, view
        last = self.last_participants()
        states = {
            self.world.runners[p].states[view.rounds]
            for p in last
            if p in self.world.rpcs
        }
        assert len(states) == 1
        assert self.world.checkpoints[done[0].facts["checkpoint"]] == view.rounds

    def last_participants(self):
        return max(self.views().values(), key=lambda v: v.counter).participants


def spec(rounds=5, min_peers=4):
    return JobSpec(
        train=TrainSpec(outer=OuterSpec(rounds=rounds)),
        require=RequireSpec(min_peers=min_peers),
        fault=FaultSpec(patience_seconds=4.0),
    )


@pytest.fixture
async def mesh(tmp_path):
    async with trio.open_nursery() as nursery:
        mesh = Mesh(nursery, tmp_path)
        for index in range(4):
            await mesh.start(index)
        yield mesh
        nursery.cancel_scope.cancel()


async def test_a_job_runs_to_its_checkpoint(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(lambda: mesh.views() and mesh.all_are("done"))
    mesh.check_equal(job)
    view = mesh.views()[0]
    assert view.facts["tokens"] == 5 * 4 * 100
    assert view.facts["peers_equal"] == 4
    assert view.facts["validation_loss"] == 1.5
    assert view.facts["loss"] == 2.0
    links = [k for k in view.facts if k.startswith(LINK_FACT)]
    assert len(links) == 16
    events = await mesh.services[2].events(job)
    kinds = [event.kind for event in events]
    assert kinds.count("round") == 5
    assert kinds[-1] == "done"
    assert [e.seq for e in events] == sorted({e.seq for e in events})
    assert await mesh.services[2].events(job, since=events[-1].seq) == []


async def test_a_killed_participant_does_not_stop_the_others(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(mesh.decided(2))
    mesh.kill(2)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    assert mesh.ids[2] not in mesh.last_participants()


async def test_a_killed_process_is_replaced_without_the_full_patience(
    autojump_clock, mesh
):
    await mesh.services[0].submit(spec(rounds=30))
    await mesh.until(mesh.decided(2))
    mesh.kill(2)
    killed_at = trio.current_time()
    await mesh.until(lambda: len(mesh.last_participants()) == 3)
    assert trio.current_time() - killed_at < 0.4 * 4.0


async def test_a_broken_connection_alone_kills_nobody(autojump_clock, mesh):
    await mesh.services[0].submit(spec(rounds=12))
    await mesh.until(mesh.decided(2))
    for _ in range(10):
        mesh.world.rpcs[mesh.ids[0]].break_connection(mesh.ids[2])
        await trio.sleep(0.5)
    await mesh.until(lambda: mesh.all_are("done"))
    assert max(v.counter for v in mesh.views().values()) == 1


async def test_a_paused_process_gets_the_full_patience(autojump_clock, mesh):
    """Its connection breaks, but calls to it hang instead of being refused."""
    await mesh.services[0].submit(spec(rounds=30))
    await mesh.until(mesh.decided(2))
    ids = mesh.ids
    mesh.world.groups = [{ids[0], ids[1], ids[3]}, {ids[2]}]
    mesh.world.rpcs[ids[0]].break_connection(ids[2])
    await trio.sleep(3.5)
    assert len(mesh.last_participants()) == 4
    mesh.world.groups = None
    await mesh.until(lambda: mesh.all_are("done"))
    assert max(v.counter for v in mesh.views().values()) == 1


async def test_a_wrong_state_is_counted_and_fetched_again(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=6))
    await mesh.until(mesh.decided(2))
    runner = mesh.world.runners[mesh.ids[3]]
    runner.states[runner.round] = "bit flip"
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    assert mesh.counters[0].snapshot()[f"{INTEGRITY_ERRORS}:jobs"] == 1
    assert mesh.views()[0].counter == 2, "one new generation, to fetch in"
    assert len(mesh.last_participants()) == 4
    kinds = [event.kind for event in await mesh.services[1].events(job)]
    assert kinds.count("diverged") == 1


async def test_a_killed_coordinator_is_succeeded(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(mesh.decided(2))
    before = await mesh.services[1].events(job)
    mesh.kill(0)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    after = await mesh.services[1].events(job, since=before[-1].seq)
    assert [e.kind for e in after][-1] == "done"
    assert mesh.views()[1].facts["tokens"] >= 5 * 3 * 100


async def test_a_newcomer_takes_part_from_a_later_round_on(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=8))
    await mesh.until(mesh.decided(2))
    await mesh.start(4)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    assert mesh.ids[4] in mesh.last_participants()


async def test_halves_pause_and_resume_after_the_heal(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=6))
    await mesh.until(mesh.decided(2))
    ids = mesh.ids
    mesh.world.groups = [{ids[0], ids[1]}, {ids[2], ids[3]}]
    services = [mesh.services[i] for i in range(4)]
    await mesh.until(
        lambda: all((w := s.why(job)) and w.code == "no_quorum" for s in services)
    )
    assert not mesh.all_are("done")
    mesh.world.groups = None
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)


async def test_a_killed_peer_comes_back_and_ends_with_the_rest(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=8))
    await mesh.until(mesh.decided(2))
    mesh.kill(1)
    await trio.sleep(0.5)
    await mesh.start(1)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)


async def test_a_failed_worker_is_replaced_and_nobody_else_stops(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=8))
    await mesh.until(mesh.decided(2))
    await mesh.world.runners[mesh.ids[3]].send.send(
        RunnerFailed("E_WORKER", "segfault")
    )
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    kinds = [e.kind for e in mesh.services[3]._task(job).log.since(0)]
    assert "worker_failed" in kinds


async def test_a_job_that_ended_before_this_daemon_started_is_known_by_its_status(
    autojump_clock, mesh
):
    job = await mesh.services[0].submit(spec())
    await mesh.until(lambda: mesh.views() and mesh.all_are("done"))
    before = mesh.views()[0]
    mesh.kill(3)
    await mesh.start(3)
    service = mesh.services[3]
    (view,) = service.jobs()
    assert (view.state, view.round, view.rounds) == ("done", 5, 5)
    assert view.facts["checkpoint"] == before.facts["checkpoint"]
    assert view.coordinator == mesh.ids[0]
    (event,) = await service.events(job)
    assert (event.kind, event.peer) == ("done", mesh.ids[0])
    assert event.facts["tokens"] == before.facts["tokens"]
    assert event.seq > (await mesh.services[0].events(job))[-1].seq
    assert await service.events(job, since=event.seq) == []
    assert service.why(job) is None
    await service.stop(job)
    assert service.jobs() == [view]


async def test_stop_from_a_member_that_does_not_coordinate(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(mesh.decided(1))
    await mesh.services[3].stop(job)
    await mesh.until(lambda: mesh.all_are("cancelled"))


async def test_a_full_disk_stops_this_peer_only(autojump_clock, mesh):
    mesh.stores[3].full = True
    job = await mesh.services[0].submit(spec(min_peers=3))
    await mesh.until(
        lambda: all(
            mesh.views().get(i) and mesh.views()[i].state == "done" for i in range(3)
        )
    )
    why = mesh.services[3].why(job)
    assert why is not None
    assert "disk" in why.reason


async def test_a_job_that_waits_says_for_what(autojump_clock, mesh):
    mesh.kill(3)
    mesh.members[mesh.ids[3]] = MemberFacts(
        memory_bytes=1 << 30
    )  # believed to be there
    job = await mesh.services[0].submit(spec())
    await trio.sleep(10)
    why = mesh.services[0].why(job)
    assert why is not None
    assert (why.code, why.reason) == ("waiting_for_peers", "3 of 4 peers are there")


async def test_what_the_mesh_lacks_is_said_at_submit(autojump_clock, mesh):
    with pytest.raises(
        ResourceExhausted, match="needs 9 peers, the mesh has 4"
    ) as caught:
        await mesh.services[0].submit(spec(min_peers=9))
    assert caught.value.exit_code == 6
    greedy = JobSpec(require=RequireSpec(memory_bytes=1 << 40))
    with pytest.raises(ResourceExhausted, match="free memory"):
        await mesh.services[0].submit(greedy)
    with pytest.raises(ConfigError):
        await mesh.services[0].stop("nope")
    with contextlib.suppress(ResourceExhausted):
        await mesh.services[0].submit(JobSpec())
