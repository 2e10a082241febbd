"""Daemons in one trio process: fake Rpc and Paths over memory and socketpairs.

The workers, the sandbox, the certificates and the TLS between stages are the real ones.
"""

import socket
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import trio

from fabric.bulk.certificates import check_job_certificate_untrusted
from fabric.core.errors import FabricError, RemoteRefused, Unavailable
from fabric.core.ids import JobId, PeerId
from fabric.core.signing import Ed25519Signer
from fabric.jobs.messages import Generation
from fabric.jobs.spec import JobSpec, ServeSpec, job_id
from fabric.net.paths_api import Purpose, WorkerSocket
from inference.config import InferenceConfig
from inference.gateway_service import open_gateway
from inference.service import ServeService
from inference.stage_service import RunnerPorts


class FakeRpc:
    """Calls between the daemons of a :class:`Mesh`, without a network."""

    def __init__(self, mesh, peer_id):
        self._mesh, self._peer_id = mesh, peer_id
        self.handlers = {}
        self.async_handlers = {}

    def register(self, method, handler):
        self.handlers[method] = handler

    def register_async(self, method, handler):
        self.async_handlers[method] = handler

    async def call(self, peer, method, request):
        await trio.lowlevel.checkpoint()
        other = self._mesh.daemons.get(peer)
        if other is None or peer == self._peer_id:
            raise Unavailable(f"no daemon {peer}")
        self._mesh.calls.append((method, self._peer_id, peer))
        rpc = other.rpc
        try:
            if method in rpc.handlers:
                return rpc.handlers[method](self._peer_id, request)
            return await rpc.async_handlers[method](self._peer_id, request)
        except FabricError as exc:
            raise RemoteRefused(
                exc.reason, code=exc.code, next_step=exc.next_step
            ) from exc

    def connected(self):
        return frozenset(self._mesh.daemons) - {self._peer_id}

    def lost(self):
        return trio.open_memory_channel(0)[1]

    def rtt_seconds(self, peer):
        return None


class FakeSockets:
    def __init__(self, certificate, peers):
        self.certificate, self.peers, self.counter = certificate, peers, 0
        self.send, self._receive = trio.open_memory_channel(16)

    async def accept(self):
        return await self._receive.receive()

    def allow(self, peers, *, min_counter):
        self.peers, self.counter = peers, min_counter

    def renew(self, certificate):
        self.certificate = certificate

    def close(self):
        self.send.close()
        while True:
            try:
                self._receive.receive_nowait().sock.close()
            except (trio.WouldBlock, trio.EndOfChannel):
                return


class FakePaths:
    """Socketpairs under real job certificates, so that the workers speak TLS."""

    def __init__(self, mesh, peer_id):
        self._mesh, self._peer_id = mesh, peer_id
        self.expected = {}

    async def open(self, peer, purpose: Purpose, certificate: bytes):
        await trio.lowlevel.checkpoint()
        other = self._mesh.daemons[peer].paths.expected.get(purpose.job)
        if other is None or purpose.counter < other.counter:
            raise Unavailable("no such worker yet")
        if self._peer_id not in other.peers:
            raise RemoteRefused("not a participant", code="E_NOT_PARTICIPANT")
        for der, owner in ((certificate, self._peer_id), (other.certificate, peer)):
            check_job_certificate_untrusted(der, owner, purpose.job, time.time())
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # as trio's sockets arrive
        inbound = WorkerSocket(
            theirs, self._peer_id, certificate, False, purpose, "direct"
        )
        other.send.send_nowait(inbound)
        return WorkerSocket(ours, peer, other.certificate, True, purpose, "direct")

    def expect(self, job, certificate, peers):
        self.expected[job] = FakeSockets(certificate, peers)
        return self.expected[job]

    def kind(self, peer):
        return "direct"


async def until(condition) -> None:
    """Return when ``condition()`` holds; bound it at the call site."""
    while not condition():  # noqa: ASYNC110 - the state of another process
        await trio.sleep(0.005)


@dataclass
class Daemon:
    peer_id: PeerId
    rpc: FakeRpc
    paths: FakePaths
    service: ServeService
    scratch: Path


@dataclass
class Context:
    job: JobId
    spec: JobSpec
    peer_id: PeerId
    scratch: Path


@dataclass
class Mesh:
    """Daemons and one serving job.

    Args:
        directory: The model.
        scratch: For the workers.
        stages: Length of the chain.
        config: Of every daemon.
    """

    directory: Path
    scratch: Path
    stages: int
    config: InferenceConfig = field(default_factory=InferenceConfig)
    daemons: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    runners: dict = field(default_factory=dict)
    scopes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.spec = JobSpec(
            kind="serve",
            serve=ServeSpec(checkpoint="r", stages=self.stages, model_name="tiny"),
        )
        self.stack = AsyncExitStack()

    async def __aenter__(self):
        # Runners live in tasks of this nursery: a test may start one in the middle.
        self.nursery = await self.stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(self, *info):
        self.nursery.cancel_scope.cancel()
        return await self.stack.__aexit__(*info)

    def add(self) -> Daemon:
        signer = Ed25519Signer.generate()
        peer_id = signer.peer_id
        rpc, paths = FakeRpc(self, peer_id), FakePaths(self, peer_id)

        async def fetch(root: str) -> Path:
            await trio.lowlevel.checkpoint()
            return self.directory

        ports = RunnerPorts(paths, signer, fetch, time.time, self.config)
        service = ServeService(peer_id, rpc, ports)
        service.register()
        scratch = self.scratch / peer_id
        scratch.mkdir()
        daemon = Daemon(peer_id, rpc, paths, service, scratch)
        self.daemons[peer_id] = daemon
        return daemon

    async def join(self, daemon: Daemon):
        context = Context(job_id(self.spec), self.spec, daemon.peer_id, daemon.scratch)

        async def run(task_status):
            async with daemon.service.open_runner(context) as runner:
                with trio.CancelScope() as scope:
                    task_status.started((runner, scope))
                    await trio.sleep_forever()

        runner, scope = await self.nursery.start(run)
        self.runners[daemon.peer_id], self.scopes[daemon.peer_id] = runner, scope

    def leave(self, daemon: Daemon) -> None:
        """End the daemon's runner, and with it the worker."""
        self.scopes[daemon.peer_id].cancel()
        del self.daemons[daemon.peer_id]

    async def generation(self, counter: int, participants) -> None:
        """Apply a generation everywhere and wait until it serves."""
        peers = tuple(sorted(d.peer_id for d in participants))
        generation = Generation(
            job_id(self.spec), counter, peers[0], peers, 0, "", (), ""
        )
        for peer in peers:
            await self.runners[peer].apply(generation)
        with trio.fail_after(60):
            for peer in peers[: self.stages]:
                await self.until(peer, "serving")

    async def until(self, peer, state: str):
        """Return the progress that says ``state``."""
        while True:
            event = await self.runners[peer].next_event()
            facts = getattr(event, "facts", {"state": repr(event)})
            assert not repr(event).startswith("RunnerFailed"), event
            if facts.get("state") == state:
                return facts

    async def gateway(self, daemon: Daemon) -> str:
        async def run(task_status):
            async with open_gateway(
                self.config, daemon.peer_id, daemon.rpc, daemon.service
            ) as url:
                task_status.started(url)
                await trio.sleep_forever()

        return await self.nursery.start(run)
