"""Serve a checkpoint: submit the job, wait for its stages, open the endpoint."""

from __future__ import annotations

import msgspec
import trio

from fabric.core.errors import ConfigError, FabricError, PeerTimeout
from fabric.core.ids import PeerId
from fabric.jobs.service import JobsService
from fabric.jobs.spec import JobSpec, RequireSpec, ServeSpec
from fabric.net.rpc_api import Rpc
from inference.config import InferenceConfig
from inference.messages import CODEC, METHOD_MODELS, AskModels, Models
from inference.service import ServeService

READY_SECONDS = 120.0
"""Longest time until all stages have loaded; importing torch takes most of it."""
POLL_SECONDS = 0.25
OVER = frozenset({"done", "failed", "cancelled"})
"""States of a job in which nobody serves any more."""


class Serving:
    """The endpoint of this peer: one gateway for all models of the mesh.

    Args:
        own: This peer.
        rpc: Asks the first stages whether they are ready.
        serve: Stages of this peer.
        jobs: Where serving jobs are submitted.
        config: Limits and address of the gateway.
    """

    def __init__(
        self,
        own: PeerId,
        rpc: Rpc,
        serve: ServeService,
        jobs: JobsService,
        config: InferenceConfig,
    ) -> None:
        self._own = own
        self._rpc = rpc
        self._serve = serve
        self._jobs = jobs
        self._config = config
        self._url = ""
        self._error: FabricError | None = None
        # 1: the gateway is opened once
        serve.servers = self._servers
        self._wanted, self._wishes = trio.open_memory_channel[int](1)
        self._answered = trio.Event()

    def _servers(self) -> frozenset[PeerId]:
        """Return who takes part in serving jobs: they need be no neighbours."""
        jobs = [
            v for v in self._jobs.jobs() if v.kind == "serve" and v.state not in OVER
        ]
        return frozenset(peer for view in jobs for peer in view.participants)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own the gateway, once somebody wants it, until cancelled."""
        task_status.started()
        async for port in self._wishes:
            try:
                await self._run_gateway(port)
            except FabricError as exc:
                self._error = exc
                self._answered.set()

    async def _run_gateway(self, port: int) -> None:
        try:
            from inference.gateway_service import open_gateway
        except ImportError as exc:
            raise ConfigError(
                f"the endpoint needs {exc.name}, which is not installed",
                next_step="pip install 'peerfabric[serve]'",
            ) from exc
        config = self._config
        if port:
            config = msgspec.structs.replace(config, gateway_port=port)
        async with open_gateway(config, self._own, self._rpc, self._serve) as url:
            self._url = f"{url}/v1"
            self._answered.set()
            await trio.sleep_forever()

    async def serve(
        self, checkpoint: str, *, stages: int, port: int, model_name: str
    ) -> str:
        """Serve ``checkpoint`` (content root) and return the API's base URL.

        Raises:
            ConfigError: the port is taken or an extra is missing.
            ResourceExhausted: the mesh has too few peers.
            PeerTimeout: the stages were not ready within READY_SECONDS.
        """
        url = await self._endpoint(port)
        spec = JobSpec(
            kind="serve",
            name=model_name,
            serve=ServeSpec(
                checkpoint=checkpoint, stages=stages, model_name=model_name
            ),
            require=RequireSpec(min_peers=stages, max_peers=stages),
        )
        job = await self._jobs.submit(spec)
        try:
            with trio.fail_after(READY_SECONDS):
                while not await self._ready(job):  # noqa: ASYNC110 - on other peers
                    await trio.sleep(POLL_SECONDS)
        except trio.TooSlowError:
            raise PeerTimeout(
                f"the stages were not ready within {READY_SECONDS:g} s",
                next_step=f"see `fabric why {job[:8]}` and `fabric logs {job[:8]}`",
            ) from None
        return url

    async def _endpoint(self, port: int) -> str:
        """Return the gateway's URL; open it the first time."""
        if not self._url:
            self._error, self._answered = None, trio.Event()
            await self._wanted.send(port)
            await self._answered.wait()
        if self._error is not None:
            raise self._error
        return self._url

    async def _ready(self, job: str) -> bool:
        """Return whether the first stage of ``job`` takes sessions."""
        if any(model.job == job for model in self._serve.models()):
            return True
        view = next((v for v in self._jobs.jobs() if v.job == job), None)
        if view is not None and view.state in ("failed", "cancelled"):
            raise ConfigError(f"the serving job {view.state}: {view.reason}")
        for peer in view.participants if view is not None else ():
            if peer != self._own and job in await self._served_by(peer):
                return True
        return False

    async def _served_by(self, peer: PeerId) -> set[str]:
        try:
            raw = await self._rpc.call(peer, METHOD_MODELS, CODEC.encode(AskModels()))
            reply = CODEC.decode_untrusted(raw)
        except FabricError:
            return set()
        models = reply.models if isinstance(reply, Models) else ()
        return {model.job for model in models}
