"""One peer's part of a serving job: a worker process and its place in the chain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from fabric.core.errors import (
    ConfigError,
    FabricError,
    LocalProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId
from fabric.core.signing import Signer
from fabric.jobs.messages import Generation, RoundDecision, RoundReport
from fabric.jobs.runner import (
    RunnerContext,
    RunnerEvent,
    RunnerFailed,
    RunnerProgress,
)
from fabric.net.paths_api import Paths
from fabric.net.tasks import collapse_group
from fabric.net.worker_api import WorkerLimits, WorkerLink
from fabric.net.worker_link import open_worker
from inference.config import InferenceConfig
from inference.delivery_service import Delivery
from inference.layers import chain
from inference.messages import ServedModel, Submit, TokenBatch
from inference.wiring_service import Place, Wiring
from inference.worker_messages import (
    COMMANDS,
    EVENTS,
    Assign,
    ChannelLost,
    Command,
    Ended,
    Event,
    Sampled,
    Start,
    Stop,
)

FetchCheckpoint = Callable[[str], Awaitable[Path]]
"""Root id -> directory of the checkpoint on this machine; fetches what is missing."""

_MAX_EVENTS = 256
"""Events not yet read by the jobs service; progress beyond is dropped."""


@dataclass(frozen=True)
class RunnerPorts:
    """What every runner of a daemon needs from it.

    Attributes:
        paths: Opens sockets for workers.
        signer: The daemon's identity.
        fetch: Brings a checkpoint onto this machine.
        now: Unix seconds.
        config: Limits.
    """

    paths: Paths
    signer: Signer
    fetch: FetchCheckpoint
    now: Callable[[], float]
    config: InferenceConfig


class Sessions(Protocol):
    """How a runner reaches the two ends of a session."""

    async def send_tokens(self, gateway: PeerId, batch: TokenBatch) -> None:
        """Carry tokens to a gateway, which may be this daemon."""
        ...

    async def cancel(
        self, first_stage: PeerId, job: str, gateway: PeerId, session: str
    ) -> None:
        """Ask the first stage to end a session, best effort."""
        ...


class StageRunner:
    """:class:`fabric.jobs.runner.Runner` of kind "serve".

    ``run`` owns the worker; ``apply`` only says which generation to be part of, and the
    newest wins. Sessions survive a new generation as long as the first stage stays: it
    feeds them again through the new stages.
    """

    def __init__(
        self, ports: RunnerPorts, sessions: Sessions, context: RunnerContext
    ) -> None:
        self._ports = ports
        self._sessions = sessions
        self._context = context
        self._to_owner, self._events = trio.open_memory_channel[RunnerEvent](
            _MAX_EVENTS
        )
        self._generation: Generation | None = None
        self._changed = trio.Event()
        self._connecting: trio.CancelScope | None = None
        self._serving = -1
        self._live: set[tuple[PeerId, str]] = set()
        self._link: WorkerLink | None = None
        self._delivery = Delivery(
            context.job, sessions.send_tokens, self._undeliverable
        )
        self._wiring = Wiring(
            context.job,
            context.peer_id,
            ports.signer,
            ports.paths,
            ports.now,
            self._send,
            lambda reason: self._progress(state="connecting", reason=reason),
        )

    # What the jobs service calls

    async def apply(self, generation: Generation) -> None:
        """Take part in ``generation``; returns before the stage is ready."""
        await trio.lowlevel.checkpoint()
        if generation == self._generation:
            return
        self._generation = generation
        self._changed.set()
        if self._connecting is not None:
            self._connecting.cancel()

    async def decide(self, decision: RoundDecision) -> None:
        """Do nothing: serving has no rounds."""
        await trio.lowlevel.checkpoint()

    async def save(self, directory: Path, at: int) -> None:
        """Refuse: serving changes no state that could be saved."""
        raise LocalProtocolError(f"a serving job has no state to save in {directory}")

    async def next_event(self) -> RunnerEvent:
        """Return the next fact; waits for ever."""
        return await self._events.receive()

    # What the serve service calls

    def participants(self) -> tuple[PeerId, ...]:
        """Return the generation's participants."""
        return self._generation.participants if self._generation else ()

    def chain(self) -> tuple[PeerId, ...]:
        """Return the peer of each stage, or nothing while there are too few."""
        return chain(self.participants(), self._context.spec.serve.stages)

    def model(self) -> ServedModel | None:
        """Return what is served here, while this peer's stage is connected."""
        loaded, generation = self._wiring.loaded, self._generation
        if loaded is None or generation is None or self._serving != generation.counter:
            return None
        name = self._context.spec.serve.model_name
        first = self.chain()[0]
        return ServedModel(self._context.job, name, first, loaded.context_tokens)

    async def submit(self, gateway: PeerId, request: Submit) -> None:
        """Start a session.

        Raises:
            Unavailable: this is not the first stage, or it is not ready.
            ConfigError: prompt and tokens do not fit the context.
            ResourceExhausted: too many sessions.
        """
        loaded = self._wiring.loaded
        if self.chain()[:1] != (self._context.peer_id,) or loaded is None:
            raise Unavailable("this peer is not the first stage", code="E_NOT_SERVING")
        wanted = len(request.prompt) + request.sampling.max_tokens
        if not request.prompt or wanted > loaded.context_tokens:
            raise ConfigError(
                f"prompt and tokens: {wanted} > {loaded.context_tokens}",
                code="E_CONTEXT",
            )
        config = self._ports.config
        if len(self._live) >= config.max_sequences + config.max_waiting:
            raise ResourceExhausted("too many sessions", code="E_BUSY")
        key = (gateway, request.session)
        if key in self._live:
            raise ConfigError("a session of this name is running", code="E_SESSION")
        start = Start(request.session, gateway, request.prompt, request.sampling)
        self._live.add(key)
        try:
            await self._send(start)
        except FabricError:
            self._live.discard(key)
            raise

    @property
    def num_waiting(self) -> int:
        """Sessions that wait for a place in the worker's memory."""
        return max(0, len(self._live) - self._ports.config.max_sequences)

    async def stop(self, gateway: PeerId, session: str) -> None:
        """End a session; unknown ones are already over."""
        if (gateway, session) in self._live:
            await self._send(Stop(session, gateway))

    # The worker

    async def run(self) -> None:
        """Run the worker from the first generation that needs it until cancelled."""
        try:
            await self._wait_for_a_stage()
            directory = await self._checkpoint()
            with collapse_group():
                await self._work(directory)
        except FabricError as exc:
            await self._to_owner.send(RunnerFailed(exc.code, exc.reason))
        finally:
            self._link = None
            self._serving = -1
            self._wiring.close()

    async def _wait_for_a_stage(self) -> None:
        while self._context.peer_id not in self.chain():
            self._progress(state="standing by" if self.chain() else "waiting for peers")
            self._changed = trio.Event()
            await self._changed.wait()

    async def _checkpoint(self) -> Path:
        root = self._context.spec.serve.checkpoint
        if not root:
            raise ConfigError(
                "a serving job names no checkpoint",
                code="E_NO_MODEL",
                next_step="set serve.checkpoint to the root of a checkpoint",
            )
        self._progress(state="fetching")
        # No deadline: a checkpoint may be large, and leaving the job cancels.
        return await self._ports.fetch(root)

    async def _work(self, directory: Path) -> None:
        scratch = self._context.scratch / "worker"
        await trio.Path(scratch).mkdir(parents=True, exist_ok=True)
        limits = WorkerLimits(
            scratch=scratch,
            readable=(directory,),
            memory_bytes=self._ports.config.worker_memory_bytes,
            threads=self._ports.config.worker_threads,
        )
        async with open_worker("inference.worker", [], limits) as link:
            async with trio.open_nursery() as nursery:
                self._link = link
                nursery.start_soon(self._hear, link)
                nursery.start_soon(self._delivery.run)
                while True:
                    await self._follow(directory)

    async def _follow(self, directory: Path) -> None:
        """Connect for the newest generation; return when there is a newer one."""
        changed = self._changed = trio.Event()
        self._serving = -1
        with trio.CancelScope() as self._connecting:
            await self._connect(directory)
        self._connecting = None
        await changed.wait()

    async def _connect(self, directory: Path) -> None:
        generation, peers = self._generation, self.chain()
        if generation is None or self._context.peer_id not in peers:
            self._progress(state="standing by")
            return
        place = Place(generation.counter, peers, peers.index(self._context.peer_id))
        config = self._ports.config
        assign = Assign(
            place.counter,
            place.stage,
            len(peers),
            str(directory),
            config.max_sequences,
            config.max_waiting,
            config.prefill_tokens,
        )
        loaded = await self._wiring.connect(place, assign)
        self._serving = place.counter
        self._progress(
            state="serving",
            stage=place.stage,
            stages=len(peers),
            layers=f"{loaded.layers[0]}-{loaded.layers[1] - 1}",
            parameters=loaded.parameters,
        )

    async def _send(self, command: Command, fd: int | None = None) -> None:
        if self._link is None:
            raise Unavailable("the stage's worker is not running", code="E_NOT_SERVING")
        await self._link.send(COMMANDS.encode(command), [] if fd is None else [fd])

    async def _hear(self, link: WorkerLink) -> None:
        while True:
            self._on_event(EVENTS.decode_untrusted(await link.receive()))

    def _on_event(self, event: Event) -> None:
        match event:
            case Sampled():
                for gateway, token in event.tokens:
                    self._delivery.add(gateway, token)
            case Ended():
                self._live.discard((event.reply_to, event.session))
            case ChannelLost():
                self._on_lost(event)
            case _:
                self._wiring.on_event(event)

    def _on_lost(self, lost: ChannelLost) -> None:
        """Say whose connection broke; the coordinator answers with a generation."""
        generation, peers = self._generation, self.chain()
        was_in_use = self._wiring.on_lost(lost)
        if generation is None or lost.epoch != generation.counter or not was_in_use:
            return
        if self._context.peer_id not in peers:
            return
        self._serving = -1
        self._progress(state="broken", reason=f"{lost.channel}: {lost.reason}")
        place = Place(lost.epoch, peers, peers.index(self._context.peer_id))
        neighbour, _ = place.outgoing if lost.outgoing else place.incoming
        self._tell(
            RoundReport(
                self._context.job,
                generation.counter,
                generation.base_round,
                holds=(),
                broken=(neighbour,),
            )
        )

    async def _undeliverable(self, gateway: PeerId, sessions: frozenset[str]) -> None:
        for session in sessions:
            for first in self.chain()[:1]:
                await self._sessions.cancel(first, self._context.job, gateway, session)

    def _progress(self, **facts: str | int | float | bool) -> None:
        self._tell(RunnerProgress(dict(facts)))

    def _tell(self, event: RunnerEvent) -> None:
        # Nobody reads: facts for people are not worth a growing queue.
        with suppress(trio.WouldBlock):
            self._to_owner.send_nowait(event)
