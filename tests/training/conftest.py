"""Real worker processes, with the test as their daemon and coordinator."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from fabric.bulk.certificates import JobStatement, issue_job_certificate
from fabric.core.errors import Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.jobs.messages import Generation, RoundDecision, RoundReport, StateHeld
from fabric.jobs.spec import FaultSpec, JobSpec, ModelSpec, OuterSpec, TrainSpec
from fabric.net.worker_api import WorkerLimits
from fabric.net.worker_link import open_worker
from training.messages import (
    COMMAND,
    EVENT,
    ApplyGeneration,
    Certified,
    Certify,
    Configure,
    Connect,
    Decide,
    Held,
    RoundReported,
    Stop,
    WorkerReady,
)

JOB = "ab" * 32


def tiny_spec(*, wide=False, **outer) -> JobSpec:
    """A model of one state block, or, when ``wide``, of about ten."""
    outer = {
        "inner_steps": 2,
        "rounds": 3,
        "learning_rate": 1.0,
        "momentum": 0.3,
    } | outer
    return JobSpec(
        model=ModelSpec(
            hidden_size=256 if wide else 32,
            intermediate_size=1024 if wide else 64,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            context_tokens=16,
        ),
        train=TrainSpec(batch_size=2, warmup_steps=2, outer=OuterSpec(**outer)),
        fault=FaultSpec(patience_seconds=2.0),
    )


@dataclass
class Worker:
    """One worker process as its daemon sees it."""

    peer: str
    signer: Ed25519Signer
    link: object
    certificate: bytes = b""
    reports: dict[int, RoundReport] = field(default_factory=dict)
    held: dict[int, StateHeld] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    events: list = field(default_factory=list)
    alive: bool = True

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


class Cluster:
    """Starts workers, connects each pair both ways, decides rounds."""

    def __init__(self, stack: AsyncExitStack, nursery: trio.Nursery, root: Path):
        self.stack, self.nursery, self.root = stack, nursery, root
        self.workers: dict[str, Worker] = {}
        self.generation: Generation | None = None
        self.changed = trio.Event()
        self.hold_back: Callable[[int], bool] = lambda round_number: False
        self.decided: set[tuple[int, int]] = set()
        self.spec = tiny_spec()

    async def start(self, count: int, spec: JobSpec) -> list[Worker]:
        self.spec = spec
        signers = [Ed25519Signer.generate() for _ in range(count)]
        started: list[Worker] = []

        async def start_one(signer):
            scratch = self.root / signer.peer_id[-8:]
            scratch.mkdir()
            limits = WorkerLimits(scratch=scratch)
            link = await self.stack.enter_async_context(
                open_worker("training.worker", [], limits)
            )
            worker = Worker(signer.peer_id, signer, link)
            await link.send(COMMAND.encode(Configure(JOB, worker.peer, spec)))
            ready = EVENT.decode_untrusted(await link.receive())
            assert isinstance(ready, WorkerReady), ready
            now = time.time()
            statement = JobStatement(JOB, 1, ready.public_key, int(now), int(now) + 600)
            signed = issue_job_certificate(signer, statement, now)
            await link.send(COMMAND.encode(Certify(signed)))
            started.append(worker)
            self.workers[worker.peer] = worker
            self.nursery.start_soon(self._listen, worker)

        for signer in signers:  # the exit stack wants one task
            await start_one(signer)
        await self.until(lambda: all(w.certificate for w in started))
        return started

    async def _listen(self, worker: Worker) -> None:
        while True:
            try:
                event = EVENT.decode_untrusted(await worker.link.receive())
            except Unavailable as exc:
                worker.alive = False
                worker.events.append(exc)
                self._tick()
                return
            worker.events.append(event)
            match event:
                case Certified(certificate):
                    worker.certificate = certificate
                case RoundReported(report):
                    worker.reports[report.round] = report
                    await self._decide(report.round)
                case Held(held):
                    worker.held[held.round] = held
                    if held.validation_loss is not None:
                        worker.losses[held.round] = held.validation_loss
            self._tick()

    def _tick(self):
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition, seconds=120.0):
        with trio.fail_after(seconds):
            while not condition():
                await self.changed.wait()

    async def _decide(self, round_number: int) -> None:
        """Decide once every participant holds every participant's contribution."""
        generation = self.generation
        if generation is None or self.hold_back(round_number):
            return
        members = set(generation.participants)
        reports = {}
        for peer in members:
            report = self.workers[peer].reports.get(round_number)
            if report is None or report.counter != generation.counter:
                return
            reports[peer] = report
        if any(set(report.holds) != members for report in reports.values()):
            return
        if (generation.counter, round_number) in self.decided:
            return
        self.decided.add((generation.counter, round_number))
        decision = RoundDecision(
            JOB,
            generation.counter,
            round_number,
            generation.participants,
            tuple(reports[p].tokens for p in generation.participants),
            last=round_number + 1 == self.spec.train.outer.rounds,
        )
        for peer in generation.participants:
            await self.tell(self.workers[peer], Decide(decision))

    async def tell(self, worker: Worker, command, fds=()):
        if worker.alive:
            await worker.link.send(COMMAND.encode(command), fds)

    async def apply(self, workers: list[Worker], *, connect=True, **changes) -> None:
        """Commit a generation of ``workers`` and connect pairs that lack a socket."""
        known = set(self.generation.participants) if self.generation else set()
        base = self.generation or Generation(JOB, 0, workers[0].peer, (), 0, "", (), "")
        self.generation = msgspec.structs.replace(
            base,
            counter=base.counter + 1,
            participants=tuple(sorted(w.peer for w in workers)),
            **changes,
        )
        for worker in workers:
            await self.tell(worker, ApplyGeneration(self.generation))
        if connect:
            for a in workers:
                for b in workers:
                    if a is not b and not {a.peer, b.peer} <= known:
                        await self.connect(a, b)

    async def connect(self, a: Worker, b: Worker, *, tls=True) -> None:
        """Give ``a`` a socket it sends on to ``b``."""
        left, right = socket.socketpair()
        await self.give(a, b, left, outgoing=True, tls=tls)
        await self.give(b, a, right, outgoing=False, tls=tls)

    async def connect_through(self, a: Worker, b: Worker, relay: "Relay") -> None:
        """Connect ``a`` to ``b`` without TLS through ``relay``."""
        relay.start()
        await self.give(a, b, relay.entry, outgoing=True, tls=False)
        await self.give(b, a, relay.exit, outgoing=False, tls=False)

    async def give(self, a, b, sock, *, outgoing, tls=True):
        certificate = b.certificate if tls else b""
        command = Connect(b.peer, outgoing, certificate, a.certificate, "local")
        await self.tell(a, command, [sock.fileno()])
        sock.close()

    async def stop(self):
        for worker in self.workers.values():
            await self.tell(worker, Stop())


class Relay(threading.Thread):
    """Forwards a one-way byte stream; does something when ``at`` bytes have passed."""

    def __init__(self, at, act, *, flip=False):
        super().__init__(daemon=True)
        self.entry, self._source = socket.socketpair()
        self._sink, self.exit = socket.socketpair()
        self._at, self._act, self._flip = at, act, flip
        self.acted = threading.Event()

    def run(self):
        passed = 0
        with self._source, self._sink, contextlib.suppress(OSError):
            while data := bytearray(self._source.recv(1 << 16)):
                if passed <= self._at < passed + len(data):
                    if self._flip:
                        data[self._at - passed] ^= 0xFF
                    else:
                        data = data[: self._at - passed]
                    self._sink.sendall(data)
                    self._act()
                    self.acted.set()
                    if not self._flip:
                        return
                else:
                    self._sink.sendall(data)
                passed += len(data)


@pytest.fixture
async def cluster(tmp_path):
    async with AsyncExitStack() as stack:
        async with trio.open_nursery() as nursery:
            yield Cluster(stack, nursery, tmp_path)
            nursery.cancel_scope.cancel()


@pytest.fixture
def kill():
    def kill_worker(worker):
        os.kill(worker.link.pid, signal.SIGKILL)

    return kill_worker


@pytest.fixture
def spec():
    return tiny_spec


@pytest.fixture
def relay():
    return Relay
