"""Daemons' jobs services in one virtual world, with runners that add hashes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fabric.core.digest import hex_digest
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.jobs.config import JobsConfig
from fabric.jobs.messages import RoundReport, StateHeld
from fabric.jobs.ports import MemberFacts
from fabric.jobs.runner import CHECKPOINT_FACT, LINK_FACT, RunnerProgress
from fabric.jobs.service import JobsService
from fabric.jobs.spec import FaultSpec, JobSpec, OuterSpec, RequireSpec, TrainSpec
from tests.jobs.service_world import FakeRpc, FakeStore, World


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

    async def save(self, directory: Path, at: int):
        self.world.saved.append((self.me, at))
        write_state(directory, self.states[at])
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
        self.config = JobsConfig()
        self.world, self.nursery, self.tmp_path = World(), nursery, tmp_path
        self.signers = [Ed25519Signer(bytes([i] * 32)) for i in range(1, 8)]
        self.ids = [s.peer_id for s in self.signers]
        self.disks = {i: {} for i in range(7)}
        self.services, self.scopes, self.stores, self.counters = {}, {}, {}, {}
        self.members = {}
        self.hot = None

    async def start(self, index):
        me = self.ids[index]
        rpc = self.world.rpcs[me] = FakeRpc(self.world, me)
        self.members[me] = MemberFacts(memory_bytes=1 << 30)
        self.stores[index] = FakeStore(self.world, me, self.disks[index])
        self.counters[index] = Counters()
        service = JobsService(
            self.config,
            signer=self.signers[index],
            rpc=rpc,
            store=self.stores[index],
            runners={"train": factory(self.world)},
            members=lambda: self.members,
            scratch_root=self.tmp_path / str(index),
            on_checkpoint=self.on_checkpoint,
            hot=self.hot,
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

    async def on_checkpoint(self, job, spec, directory, round):
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
