"""``import training.worker.backend.register`` makes ``fabric`` a backend of torch.

Whoever starts a program that knows nothing of us imports it before the program: that
one says only ``init_process_group("fabric")``. Without a daemon ranks meet in torch's
store; :func:`use` says where sockets come from instead.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fabric.bulk.certificates import (
    Credentials,
    JobStatement,
    issue_job_certificate,
    job_credentials,
    make_worker_key,
)
from fabric.core.signing import Ed25519Signer
from training.worker.backend.measure import measure_links
from training.worker.backend.options import FabricOptions
from training.worker.backend.process_group import NAME, FabricProcessGroup
from training.worker.collectives.connect import BoardConnector
from training.worker.collectives.engine import Connector
from training.worker.collectives.links import subset, uniform_links

CERTIFICATE_SECONDS = 3600
_defaults: list[FabricOptions] = []


def use(options: FabricOptions) -> None:
    """Make ``options`` those of every group that is made without any."""
    _defaults[:] = [options]


def create(made: Any, options: Any = None) -> FabricProcessGroup:  # noqa: ANN401 - torch's own
    """Return the process group that torch asks for (its extended creation call)."""
    if not isinstance(options, FabricOptions):
        options = _defaults[0] if _defaults else FabricOptions()
    ranks = list(made.global_ranks_in_group) or list(range(made.group_size))
    names = tuple(
        options.names[rank] if rank < len(options.names) else f"rank {rank}"
        for rank in ranks
    )
    links = (
        subset(options.links, ranks)
        if options.links is not None
        else uniform_links(len(ranks))
    )
    timeout: timedelta = made.timeout
    make = options.connector
    if make is not None:
        connector = make(made.store, made.group_rank, ranks)
    else:
        connector = _from_store(made.store, made.group_rank, ranks, options, timeout)
    group = FabricProcessGroup(
        made.group_rank,
        names,
        links,
        connector,
        patience_seconds=options.patience_seconds,
        timeout=timeout,
        group_name=made.group_id,
        algorithm=options.algorithm,
    )
    if options.measure and len(ranks) > 1:
        group.use_links(measure_links(group))
    return group


def _from_store(
    store: Store,
    rank: int,
    ranks: Sequence[int],
    options: FabricOptions,
    timeout: timedelta,
) -> Connector:
    return BoardConnector(
        store,
        rank,
        len(ranks),
        ip=options.ip or _own_ip(store),
        credentials=_credentials() if options.tls else None,
        same_host=options.same_host,
        wait_seconds=timeout.total_seconds(),
    )


@lru_cache(1)
def _credentials() -> Credentials:
    """Return this process's own: without a daemon nobody else vouches for it."""
    key_pem, public_key = make_worker_key()
    now = time.time()
    statement = JobStatement(
        job="store",
        counter=0,
        spki=public_key,
        issued=int(now),
        expires=int(now) + CERTIFICATE_SECONDS,
    )
    signed = issue_job_certificate(Ed25519Signer.generate(), statement, now)
    return job_credentials(key_pem, signed)


def _own_ip(store: Store) -> str:
    """Return our address on the way to the host of the store."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = getattr(store, "host", "")
    if host:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        ):
            probe.connect((host, 9))  # sends nothing: asks the routing table
            ip: str = probe.getsockname()[0]
            return ip
    return "127.0.0.1"


if NAME not in dist.Backend.backend_list:
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
