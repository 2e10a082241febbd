"""The runner with real workers; the test is the network and the coordinator."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio

from fabric.bulk.certificates import check_job_certificate_untrusted
from fabric.core.errors import NoRoute, Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.jobs.messages import Generation, RoundDecision, RoundReport, StateHeld
from fabric.jobs.runner import (
    CHECKPOINT_FACT,
    LINK_FACT,
    RunnerFailed,
    RunnerProgress,
    RunnerResult,
)
from fabric.jobs.spec import JobSpec
from fabric.net.paths_api import WorkerSocket
from training.config import TrainConfig
from training.messages import Broken, Finished, LinkMoved, Numbers, SaveFailed
from training.service import train_runner_factory, translate

JOB = "cd" * 32


@dataclass
class Context:
    job: str
    spec: JobSpec
    peer_id: str
    scratch: Path


class Inbound:
    """Inbound sockets of one worker, in memory."""

    def __init__(self, certificate):
        self.certificate = certificate
        self.peers = frozenset()
        self.min_counter = 0
        self.send, self.receive = trio.open_memory_channel(16)

    async def accept(self):
        try:
            return await self.receive.receive()
        except trio.EndOfChannel as exc:
            raise Unavailable("no longer expected") from exc

    def allow(self, peers, *, min_counter):
        self.peers, self.min_counter = peers, min_counter

    def renew(self, certificate):
        self.certificate = certificate

    def close(self):
        self.send.close()
        self.peers = frozenset()


class Network:
    """Socketpairs between the runners of one test."""

    def __init__(self):
        self.expected = {}
        self.opened = 0
        self.cut = set()
        self.relayed = set()
        self.another = trio.Event()

    async def until_opened(self, count):
        with trio.fail_after(120):
            while self.opened < count:
                await self.another.wait()

    def paths_of(self, me):
        network = self

        class MemoryPaths:
            async def open(self, peer, purpose, certificate, kinds):
                await trio.lowlevel.checkpoint()
                path = "relay" if (me, peer) in network.relayed else "direct"
                if path not in kinds:
                    raise NoRoute("both sides map per destination")
                inbound = network.expected.get(peer)
                if (
                    inbound is None
                    or me not in inbound.peers
                    or (me, peer) in network.cut
                ):
                    raise Unavailable("no such worker yet", code="E_NO_WORKER")
                assert purpose.counter >= inbound.min_counter
                check_job_certificate_untrusted(certificate, me, JOB, CLOCK)
                network.opened += 1
                network.another.set()
                network.another = trio.Event()
                ours, theirs = socket.socketpair()
                await inbound.send.send(
                    WorkerSocket(theirs, me, certificate, False, purpose, path)
                )
                return WorkerSocket(
                    ours, peer, inbound.certificate, True, purpose, path
                )

            def expect(self, job, certificate, peers):
                inbound = network.expected[me] = Inbound(certificate)
                inbound.peers = peers
                return inbound

            def kind(self, peer):
                return "local"

        return MemoryPaths()


CLOCK = time.time()


class Node:
    def __init__(self, runner, peer):
        self.runner, self.peer = runner, peer
        self.reports, self.held, self.events = {}, {}, []


class Mesh:
    """Runners, and the coordinator that decides their rounds."""

    def __init__(self, nursery, root, spec):
        self.nursery, self.root, self.spec = nursery, root, spec
        self.network = Network()
        self.nodes = []
        self.generation = None
        self.paused = False
        self.decided = set()
        self.changed = trio.Event()

    async def add(self):
        return await self.nursery.start(self._host)

    async def _host(self, task_status=trio.TASK_STATUS_IGNORED):
        signer = Ed25519Signer.generate()
        scratch = self.root / signer.peer_id[-8:]
        scratch.mkdir()
        factory = train_runner_factory(
            self.network.paths_of(signer.peer_id),
            signer,
            TrainConfig(upgrade_seconds=0.05),
            clock=lambda: CLOCK,
        )
        async with factory(Context(JOB, self.spec, signer.peer_id, scratch)) as runner:
            node = Node(runner, signer.peer_id)
            self.nodes.append(node)
            task_status.started(node)
            await self._listen(node)

    async def apply(self, nodes, **changes):
        counter = self.generation.counter + 1 if self.generation else 1
        members = tuple(sorted(n.peer for n in nodes))
        fields = {"base_round": 0, "state_digest": "", "sources": ()} | changes
        self.generation = Generation(
            JOB, counter, members[0], members, previous="", **fields
        )
        for node in nodes:
            await node.runner.apply(self.generation)

    async def until(self, condition, seconds=120):
        with trio.fail_after(seconds):
            while not condition():
                await self.changed.wait()

    async def _listen(self, node):
        while True:
            event = await node.runner.next_event()
            node.events.append(event)
            if isinstance(event, RoundReport):
                node.reports[event.round] = event
                await self.decide(event.round)
            if isinstance(event, StateHeld):
                node.held[event.round] = event
            self.changed.set()
            self.changed = trio.Event()

    async def decide(self, number):
        members = [n for n in self.nodes if n.peer in self.generation.participants]
        reports = [n.reports.get(number) for n in members]
        names = {n.peer for n in members}
        key = (self.generation.counter, number)
        if self.paused or key in self.decided:
            return
        for report in reports:
            if report is None or report.counter != self.generation.counter:
                return
            if set(report.holds) != names:
                return
        self.decided.add(key)
        order = sorted(members, key=lambda n: n.peer)
        decision = RoundDecision(
            JOB,
            self.generation.counter,
            number,
            tuple(n.peer for n in order),
            tuple(n.reports[number].tokens for n in order),
            last=number + 1 == self.spec.train.outer.rounds,
        )
        for node in members:
            await node.runner.decide(decision)


@pytest.fixture
async def mesh(tmp_path, spec):
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery, tmp_path, spec())
        nursery.cancel_scope.cancel()


def of(node, kind):
    return [event for event in node.events if isinstance(event, kind)]


def facts(node, name):
    return [e.facts[name] for e in of(node, RunnerProgress) if name in e.facts]


def worker_pid(node):
    return node.runner._live.pid


@pytest.mark.slow
async def test_two_runners_train_through_the_end_and_one_saves(mesh):
    a, b = await mesh.add(), await mesh.add()
    await mesh.apply([a, b])
    await mesh.until(lambda: of(a, RunnerResult) and of(b, RunnerResult))
    results = [of(n, RunnerResult)[0].facts for n in (a, b)]
    assert results[0]["parameter_digest"] == results[1]["parameter_digest"]
    assert mesh.network.opened == 2
    directory = mesh.root / a.peer[-8:] / "checkpoints"
    await a.runner.save(directory, 3)
    await mesh.until(lambda: facts(a, CHECKPOINT_FACT))
    assert (Path(facts(a, CHECKPOINT_FACT)[0]) / "manifest.json").is_file()
    await a.runner.save(directory, 3)  # the step exists: said, and nothing is lost
    await mesh.until(lambda: facts(a, "checkpoint_failed"))
    assert max(facts(a, f"{LINK_FACT}{b.peer}")) > 30_000


@pytest.mark.slow
async def test_a_killed_worker_is_told_and_started_again_for_the_next_generation(mesh):
    mesh.paused = True
    a, b = await mesh.add(), await mesh.add()
    await mesh.apply([a, b])
    await mesh.until(lambda: 0 in a.reports and 0 in b.reports)
    os.kill(worker_pid(b), signal.SIGKILL)
    await mesh.until(lambda: of(b, RunnerFailed))
    assert of(b, RunnerFailed)[0].code == "E_WORKER_EXITED"
    mesh.paused = False
    await mesh.apply([a, b])
    await mesh.until(lambda: of(a, RunnerResult) and of(b, RunnerResult))
    results = [of(n, RunnerResult)[0].facts for n in (a, b)]
    assert results[0]["state_digest"] == results[1]["state_digest"]


@pytest.mark.slow
async def test_a_relayed_socket_is_replaced_as_soon_as_a_better_path_can_be_had(mesh):
    mesh.paused = True  # in the middle of a round: what was sent is sent again
    a, b = await mesh.add(), await mesh.add()
    mesh.network.relayed = {(a.peer, b.peer), (b.peer, a.peer)}
    await mesh.apply([a, b])
    await mesh.until(lambda: 0 in a.reports and 0 in b.reports)
    await mesh.network.until_opened(2)
    mesh.network.relayed.clear()
    await mesh.network.until_opened(4)
    mesh.paused = False
    await mesh.decide(0)
    await mesh.until(lambda: of(a, RunnerResult) and of(b, RunnerResult))
    results = [of(n, RunnerResult)[0].facts for n in (a, b)]
    assert results[0]["state_digest"] == results[1]["state_digest"]
    assert facts(a, f"path:{b.peer}")[-1] == "direct"
    assert mesh.network.opened == 4  # and nothing more once both are direct


@pytest.mark.slow
async def test_a_path_that_stays_closed_is_reported_broken(mesh):
    a, b = await mesh.add(), await mesh.add()
    mesh.network.cut.add((a.peer, b.peer))
    await mesh.apply([a, b])
    await mesh.until(lambda: 0 in a.reports and a.reports[0].broken == (b.peer,))
    mesh.network.cut.clear()
    await mesh.until(lambda: of(a, RunnerResult) and of(b, RunnerResult))


@pytest.mark.slow
async def test_a_spec_the_worker_refuses_fails_once_with_its_reason(mesh):
    mesh.spec = msgspec.structs.replace(
        mesh.spec, data=msgspec.structs.replace(mesh.spec.data, source="blob:ab")
    )
    node = await mesh.add()
    await mesh.until(lambda: of(node, RunnerFailed))
    assert of(node, RunnerFailed)[0].code == "E_DATA_SOURCE"
    await mesh.apply([node])  # and a later generation neither blocks nor starts it
    await node.runner.save(mesh.root, 0)


def test_events_become_what_the_jobs_service_knows():
    moved = translate(LinkMoved("p", "direct", 5, 7))
    assert moved.facts[f"{LINK_FACT}p"] == 5
    assert translate(Broken("p", False, "E", "r")) is None
    assert translate(Numbers({"loss": float("nan"), "round": 1})).facts == {"round": 1}
    assert translate(Finished({"rounds": 2})) == RunnerResult({"rounds": 2})
    failed = translate(SaveFailed("d", "E_DISK", "full"))
    assert failed.facts["checkpoint_failed"] == "E_DISK"
