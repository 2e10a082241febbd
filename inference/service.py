"""Serving in a daemon: runners by job, and the door for other daemons' requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

import trio

from fabric.core.errors import FabricError, RemoteProtocolError, Unavailable
from fabric.core.ids import PeerId
from fabric.jobs.runner import RunnerContext
from fabric.net.rpc_api import Rpc
from fabric.net.tasks import collapse_group
from inference.messages import (
    CODEC,
    MAX_MODELS,
    METHOD_CANCEL,
    METHOD_MODELS,
    METHOD_SUBMIT,
    METHOD_TOKENS,
    Cancel,
    Models,
    ServedModel,
    Submit,
    Taken,
    TokenBatch,
)
from inference.stage_service import RunnerPorts, StageRunner

_CANCEL_SECONDS = 2.0
_TAKEN = CODEC.encode(Taken())

TakeTokens = Callable[[TokenBatch], None]


class ServeService:
    """The serving jobs this daemon takes part in.

    Args:
        peer_id: This daemon.
        rpc: Calls to other daemons.
        ports: What runners need.

    Attributes:
        servers: Tells who may serve models, connected or not.
    """

    def __init__(self, peer_id: PeerId, rpc: Rpc, ports: RunnerPorts) -> None:
        self._peer_id = peer_id
        self._rpc = rpc
        self._ports = ports
        self._runners: dict[str, StageRunner] = {}
        self._gateway: TakeTokens | None = None
        self.servers: Callable[[], Iterable[PeerId]] = tuple

    def register(self) -> None:
        """Answer other daemons from now on."""
        self._rpc.register(METHOD_MODELS, self._on_models)
        self._rpc.register_async(METHOD_SUBMIT, self._on_submit)
        self._rpc.register_async(METHOD_CANCEL, self._on_cancel)

    def deliver_to(self, gateway: TakeTokens) -> None:
        """Give this daemon's own gateway the tokens of its sessions directly."""
        self._gateway = gateway

    @asynccontextmanager
    async def open_runner(self, context: RunnerContext) -> AsyncIterator[StageRunner]:
        """Take part in ``context.job`` while the block lasts; leaving ends the worker.

        This is the runner factory of job kind "serve".
        """
        runner = StageRunner(self._ports, self, context)
        self._runners[context.job] = runner
        try:
            with collapse_group():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(runner.run)
                    yield runner
                    nursery.cancel_scope.cancel()
        finally:
            del self._runners[context.job]

    def models(self) -> tuple[ServedModel, ...]:
        """Return what this daemon takes part in serving that is ready."""
        found = (runner.model() for runner in self._runners.values())
        return tuple(model for model in found if model is not None)[:MAX_MODELS]

    def num_waiting(self) -> int:
        """Return how many sessions wait for a place at this peer's first stages."""
        return sum(runner.num_waiting for runner in self._runners.values())

    async def submit(self, gateway: PeerId, request: Submit) -> None:
        """Start a session whose tokens go to ``gateway``.

        Raises:
            Unavailable: this daemon does not head a chain of that job.
            ConfigError, ResourceExhausted: see :meth:`StageRunner.submit`.
        """
        runner = self._runners.get(request.job)
        if runner is None:
            raise Unavailable("not serving that job", code="E_NOT_SERVING")
        await runner.submit(gateway, request)

    async def stop(self, caller: PeerId, request: Cancel) -> None:
        """End a session of ``caller``, or, for a participant, of a lost gateway."""
        runner = self._runners.get(request.job)
        if runner is None:
            return
        gateway = caller
        if request.gateway and caller in runner.participants():
            gateway = PeerId(request.gateway)
        await runner.stop(gateway, request.session)

    async def send_tokens(self, gateway: PeerId, batch: TokenBatch) -> None:
        """Carry tokens to a gateway, which may be this daemon."""
        if gateway == self._peer_id and self._gateway is not None:
            self._gateway(batch)
            return
        await self._rpc.call(gateway, METHOD_TOKENS, CODEC.encode(batch))

    async def cancel(
        self, first_stage: PeerId, job: str, gateway: PeerId, session: str
    ) -> None:
        """Ask the first stage to end a session, best effort."""
        request = Cancel(job, session, gateway)
        with trio.move_on_after(_CANCEL_SECONDS), suppress(FabricError):
            if first_stage == self._peer_id:
                await self.stop(self._peer_id, request)
            else:
                await self._rpc.call(first_stage, METHOD_CANCEL, CODEC.encode(request))

    def _on_models(self, caller: PeerId, request: bytes) -> bytes:
        return CODEC.encode(Models(self.models()))

    async def _on_submit(self, caller: PeerId, request: bytes) -> bytes:
        message = CODEC.decode_untrusted(request)
        if not isinstance(message, Submit):
            raise RemoteProtocolError(f"{type(message).__name__} to serve.submit")
        await self.submit(caller, message)
        return _TAKEN

    async def _on_cancel(self, caller: PeerId, request: bytes) -> bytes:
        message = CODEC.decode_untrusted(request)
        if not isinstance(message, Cancel):
            raise RemoteProtocolError(f"{type(message).__name__} to serve.cancel")
        await self.stop(caller, message)
        return _TAKEN
