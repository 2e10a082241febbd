"""Settings of the training runner on one machine."""

from __future__ import annotations

from typing import Annotated

import msgspec


class TrainConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What a training worker may use, and how its connections are opened.

    Attributes:
        worker_memory_bytes: Private memory of a worker above the interpreter's.
        worker_threads: torch threads: cores / worker processes.
        max_restarts: A worker that died without saying why is started again this often.
        start_seconds: A worker must be ready within this; importing torch is slow.
        certificate_seconds: Life of a job certificate, at most 3600; renewed at half.
        first_backoff_seconds: Pause before a failed path is tried again; it doubles.
        max_backoff_seconds: Longest such pause.
        upgrade_seconds: A relayed socket is tried to be replaced by a direct or punched
            one after this; the pause doubles with each failure.
        max_upgrade_seconds: Longest such pause.
        hot_memory_bytes: Memory for states kept outside the workers: the newest of each
            job here, and of jobs elsewhere whose buddy we are; 0 keeps none.
    """

    worker_memory_bytes: int = 8 << 30
    worker_threads: int = 1
    max_restarts: int = 1
    start_seconds: float = 120.0
    certificate_seconds: int = 3600
    first_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 2.0
    upgrade_seconds: float = 2.0
    max_upgrade_seconds: float = 60.0
    hot_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
