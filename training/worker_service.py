"""One training worker while it lives: its process, its sockets, its certificate.

pump      the only task that writes to the worker: commands, and sockets
listen    reads the worker's events; ends everything when the worker ends
accept    inbound sockets, which other peers opened
renew     a new certificate at half the life of the old one
keep (xP) an outgoing socket to each other participant, opened again when it breaks,
          and when it is relayed and a better path can be had
"""

from __future__ import annotations

import io
import random
import socket
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import msgspec
import trio

from fabric.bulk.certificates import JobStatement, issue_job_certificate
from fabric.core.errors import (
    FabricError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.ids import PeerId
from fabric.core.signing import Signer
from fabric.jobs.messages import Generation
from fabric.jobs.runner import RunnerContext
from fabric.net.paths_api import Paths, Purpose, WorkerSocket, WorkerSockets
from fabric.net.ports import ALL_PATHS, BETTER_THAN_RELAY, PathKind
from fabric.net.worker_api import WorkerLimits, WorkerLink
from fabric.net.worker_link import open_worker
from training.config import TrainConfig
from training.messages import (
    COMMAND,
    EVENT,
    ApplyGeneration,
    Broken,
    Certified,
    Certify,
    Command,
    Configure,
    Connect,
    Event,
    Failed,
    LoadHot,
    WorkerReady,
    WriteHot,
)

MAX_COMMANDS = 64
"""Commands and sockets that wait while the worker starts; then the sender waits."""
CHANNEL = "exchange"

Descriptor = socket.socket | io.FileIO
"""What a command may carry; closed once it is sent."""
Report = Callable[[Event], Awaitable[None]]
"""Takes each event that is not about certificates or connections."""
PathReport = Callable[[frozenset[PeerId]], Awaitable[None]]
"""Takes the peers to which no path has been found for longer than patience."""


class WorkerEnded(msgspec.Struct, frozen=True):
    """Why a worker is gone.

    Attributes:
        code: Stable name.
        reason: With the end of the worker's standard error, if it crashed.
        may_restart: Whether the same job could work in a new process.
    """

    code: str
    reason: str
    may_restart: bool


class LiveWorker:
    """One worker process and its connections.

    Args:
        context: The job, this peer, the scratch directory.
        paths: Opens and accepts sockets.
        signer: Signs the job certificate.
        config: Limits.
        clock: Unix seconds, for certificates.
        report: Told what the worker says.
        report_paths: Told which peers cannot be reached.
        resume: Directory of the checkpoint to go on from, inside the scratch.
    """

    def __init__(
        self,
        context: RunnerContext,
        paths: Paths,
        signer: Signer,
        config: TrainConfig,
        *,
        clock: Callable[[], float],
        report: Report,
        report_paths: PathReport,
        resume: Path | None = None,
    ) -> None:
        self._context = context
        self._paths = paths
        self._signer = signer
        self._config = config
        self._clock = clock
        self._report = report
        self._report_paths = report_paths
        self._resume = resume
        self._patience = context.spec.fault.patience_seconds
        self._send, self._commands = trio.open_memory_channel[
            tuple[Command, Descriptor | None]
        ](MAX_COMMANDS)
        self._generation: Generation | None = None
        self._public_key = b""
        self._certificate = b""
        self._sockets: WorkerSockets | None = None
        self._keepers: dict[PeerId, trio.CancelScope] = {}
        self._broken: dict[PeerId, trio.Event] = {}
        self._unreachable: frozenset[PeerId] = frozenset()
        self._ended: WorkerEnded | None = None
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker, once it is started."""
        return self._pid

    async def tell(self, command: Command) -> None:
        """Queue a command for the worker; nothing happens once it has ended."""
        await self._queue(command, None)

    async def tell_with(self, command: WriteHot | LoadHot, file: io.FileIO) -> None:
        """Queue a command with the file it is about; the file is ours to close."""
        await self._queue(command, file)

    async def run(self) -> WorkerEnded:
        """Run the worker until it ends; leaving kills it."""
        limits = WorkerLimits(
            scratch=self._context.scratch,
            memory_bytes=self._config.worker_memory_bytes,
            threads=self._config.worker_threads,
        )
        try:
            async with open_worker("training.worker", [], limits) as link:
                self._pid = link.pid
                with trio.fail_after(self._config.start_seconds):
                    await self._start(link)
                await self._serve(link)
        except trio.TooSlowError:
            reason = f"worker was not ready in {self._config.start_seconds:.0f} s"
            self._end("E_WORKER_START", reason, may_restart=True)
        except (Unavailable, RemoteProtocolError) as exc:
            self._end(exc.code, exc.reason, may_restart=True)
        finally:
            self._drop_commands()
        assert self._ended is not None
        return self._ended

    async def _start(self, link: WorkerLink) -> None:
        """Configure the worker and wait for its certificate."""
        ready = EVENT.decode_untrusted(await link.receive())
        if not isinstance(ready, WorkerReady):
            raise RemoteProtocolError("the worker's first event is not WorkerReady")
        self._public_key = ready.public_key
        configure = Configure(
            self._context.job,
            self._context.peer_id,
            self._context.spec,
            str(self._resume or ""),
        )
        await link.send(COMMAND.encode(configure))
        await link.send(COMMAND.encode(self._certify()))
        match EVENT.decode_untrusted(await link.receive()):
            case Certified(certificate):
                self._certificate = certificate
            case Failed(code, reason, may_restart):
                self._end(code, reason, may_restart=may_restart)
            case _:
                raise RemoteProtocolError("the worker did not show its certificate")

    async def _serve(self, link: WorkerLink) -> None:
        if self._ended is not None:
            return
        self._sockets = self._paths.expect(
            self._context.job, self._certificate, frozenset()
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, link, nursery)
                nursery.start_soon(self._accept, self._sockets)
                nursery.start_soon(self._renew)
                await self._listen(link)
                nursery.cancel_scope.cancel()
        finally:
            self._sockets.close()

    # -- the worker ---------------------------------------------------------------

    async def _listen(self, link: WorkerLink) -> None:
        """Pass on what the worker says until it ends."""
        try:
            while True:
                event = EVENT.decode_untrusted(await link.receive())
                await self._take(event)
                if isinstance(event, Failed):
                    self._end(event.code, event.reason, may_restart=event.may_restart)
                    return
        except (Unavailable, RemoteProtocolError) as exc:
            self._end(exc.code, exc.reason, may_restart=True)

    async def _take(self, event: Event) -> None:
        match event:
            case Certified(certificate):
                self._certificate = certificate
                if self._sockets is not None:
                    self._sockets.renew(certificate)
            case Broken(peer, outgoing=True):
                if (lost := self._broken.get(PeerId(peer))) is not None:
                    lost.set()
            case _:
                await self._report(event)

    async def _pump(self, link: WorkerLink, nursery: trio.Nursery) -> None:
        """Write what is queued, in order: sockets after the generation they are for."""
        async for command, sock in self._commands:
            try:
                await link.send(
                    COMMAND.encode(command), [sock.fileno()] if sock else []
                )
            except Unavailable:
                return  # the listener says why
            finally:
                if sock is not None:
                    sock.close()
            if isinstance(command, ApplyGeneration):
                self._enter(command.generation, nursery)

    async def _queue(self, command: Command, sock: Descriptor | None) -> None:
        try:
            await self._send.send((command, sock))
        except trio.BrokenResourceError:
            if sock is not None:
                sock.close()
        except trio.Cancelled:
            if sock is not None:
                sock.close()
            raise

    def _drop_commands(self) -> None:
        while True:
            try:
                _, sock = self._commands.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                break
            if sock is not None:
                sock.close()
        self._commands.close()

    def _end(self, code: str, reason: str, *, may_restart: bool) -> None:
        if self._ended is None:
            self._ended = WorkerEnded(code, reason, may_restart)

    # -- certificate --------------------------------------------------------------

    def _certify(self) -> Certify:
        now = self._clock()
        statement = JobStatement(
            job=self._context.job,
            counter=self._generation.counter if self._generation else 0,
            spki=self._public_key,
            issued=int(now),
            expires=int(now) + self._config.certificate_seconds,
        )
        return Certify(issue_job_certificate(self._signer, statement, now))

    async def _renew(self) -> None:
        while True:
            await trio.sleep(self._config.certificate_seconds / 2)
            await self.tell(self._certify())

    # -- paths --------------------------------------------------------------------

    def _enter(self, generation: Generation, nursery: trio.Nursery) -> None:
        """Keep a path to each other participant, and to nobody else."""
        self._generation = generation
        me = self._context.peer_id
        others = frozenset(PeerId(p) for p in generation.participants if p != me)
        if me not in generation.participants:
            others = frozenset()
        assert self._sockets is not None
        self._sockets.allow(others, min_counter=generation.counter)
        for peer in self._keepers.keys() - others:
            self._keepers.pop(peer).cancel()
        self._unreachable &= others
        for peer in sorted(others - self._keepers.keys()):
            scope = self._keepers[peer] = trio.CancelScope()
            nursery.start_soon(self._keep, peer, scope)

    async def _keep(self, peer: PeerId, scope: trio.CancelScope) -> None:
        """Hold an outgoing socket to ``peer`` open until ``scope`` is cancelled."""
        pause = self._config.first_backoff_seconds
        failing_since: float | None = None
        with scope:
            while True:
                opened_at = trio.current_time()
                try:
                    opened = await self._open(peer)
                except FabricError:
                    failing_since = failing_since or opened_at
                    if trio.current_time() - failing_since >= self._patience:
                        await self._reachable(peer, reached=False)
                else:
                    await self._reachable(peer, reached=True)
                    lost = self._broken[peer] = trio.Event()
                    await self._hand_over(opened, outgoing=True)
                    await self._hold(peer, opened.path, lost)
                    failing_since = None
                if trio.current_time() - opened_at > self._patience:
                    pause = self._config.first_backoff_seconds
                # Half of it random: two peers that lost each other do not step in time.
                await trio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, self._config.max_backoff_seconds)

    async def _hold(self, peer: PeerId, path: str, lost: trio.Event) -> None:
        """Return when the socket to ``peer`` broke; a relayed one is replaced.

        The worker sends again on a new socket what it had sent on the old one.
        """
        pause = self._config.upgrade_seconds
        while path == "relay":
            with trio.move_on_after(pause):
                await lost.wait()
                return
            try:
                opened = await self._open(peer, BETTER_THAN_RELAY)
            except FabricError:
                pause = min(2 * pause, self._config.max_upgrade_seconds)
            else:
                path = opened.path
                await self._hand_over(opened, outgoing=True)
        await lost.wait()

    async def _open(
        self, peer: PeerId, kinds: Collection[PathKind] = ALL_PATHS
    ) -> WorkerSocket:
        assert self._generation is not None
        purpose = Purpose(self._context.job, self._generation.counter, CHANNEL)
        try:
            with trio.fail_after(self._patience):
                return await self._paths.open(peer, purpose, self._certificate, kinds)
        except trio.TooSlowError as exc:
            raise PeerTimeout(f"no path to {peer} in {self._patience:g} s") from exc

    async def _accept(self, sockets: WorkerSockets) -> None:
        while True:
            try:
                accepted = await sockets.accept()
            except Unavailable:
                return  # closed: the worker is ending
            await self._hand_over(accepted, outgoing=False)

    async def _hand_over(self, opened: WorkerSocket, *, outgoing: bool) -> None:
        connect = Connect(
            peer=opened.peer,
            outgoing=outgoing,
            certificate=opened.peer_certificate,
            own_certificate=self._certificate,
            path=opened.path,
        )
        await self._queue(connect, opened.sock)

    async def _reachable(self, peer: PeerId, *, reached: bool) -> None:
        changed = self._unreachable - {peer} if reached else self._unreachable | {peer}
        if changed != self._unreachable:
            self._unreachable = changed
            await self._report_paths(changed)
