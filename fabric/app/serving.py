"""Serve a checkpoint: submit the job, wait for its stages, open the endpoint."""

from __future__ import annotations

import trio

from fabric.core.ids import PeerId
from fabric.jobs.service import JobsService
from fabric.net.rpc_api import Rpc
from inference.config import InferenceConfig
from inference.service import ServeService


class Serving:
    """The endpoints of this peer."""

    def __init__(
        self,
        own: PeerId,
        rpc: Rpc,
        serve: ServeService,
        jobs: JobsService,
        config: InferenceConfig,
    ) -> None:
        self._own = own

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run."""
        task_status.started()
        await trio.sleep_forever()

    async def serve(
        self, checkpoint: str, *, stages: int, port: int, model_name: str
    ) -> str:
        """Serve."""
        return ""
