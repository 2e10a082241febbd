"""Checkpoints in one mesh: publishing, copies, states in memory, resuming."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import trio

from checkpoints.mesh.replication_service import Replication, ReplicationPorts
from crdt_store.service import Store
from dht.blobs import BlobStore
from dht.erasure import check_code
from dht.service import ContentService
from fabric.app.checkpoint_flow import CheckpointFlow, content_root
from fabric.app.config import NodeConfig
from fabric.app.domains import member_domains
from fabric.app.home import Home
from fabric.app.saved_states import HeadStates
from fabric.core.digest import hex_digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId
from fabric.core.signing import Signer
from fabric.core.telemetry import Counters
from fabric.jobs.seat import Seat
from fabric.jobs.service import JobsService
from fabric.jobs.spec import JobSpec
from fabric.jobs.submission import read_spec_untrusted
from fabric.net.paths_api import BulkPaths
from fabric.net.rpc_api import Rpc
from training.hot_service import HotPorts, HotService
from training.hot_store import HotStore

SHARED_MEMORY = Path("/dev/shm")
"""A file system in memory: its files outlive processes, not the machine."""
_NOTE = ".home"


def hot_folder(home: Home) -> Path:
    """Return where this peer keeps states; on disk where there is no shared memory."""
    name = hex_digest(os.fsencode(home.data))[:16]
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        return SHARED_MEMORY / f"fabric-{os.getuid()}-{name}"
    return home.state / "hot"


def claim_hot_folder(home: Home, folder: Path) -> None:
    """Note whose folder it is, and remove those of peers that are gone for good.

    A home that was deleted, as those of tests and demos are, would else leave its
    states in memory until the machine restarts.
    """
    if folder.parent != SHARED_MEMORY:
        return
    for note in SHARED_MEMORY.glob(f"fabric-{os.getuid()}-*{_NOTE}"):
        try:
            owner = Path(os.fsdecode(note.read_bytes()))
            if not owner.exists():
                shutil.rmtree(note.with_suffix(""), ignore_errors=True)
                note.unlink(missing_ok=True)
        except OSError:
            continue  # another daemon did it
    folder.with_suffix(_NOTE).write_bytes(os.fsencode(home.data))


def running_spec(store: Store, job: JobId) -> JobSpec | None:
    """Return the spec of a job that is not over, as the mesh knows it."""
    raw, status = store.jobs.spec(job), store.jobs.status(job)
    if raw is None or (status is not None and status.final):
        return None
    try:
        return read_spec_untrusted(job, raw)
    except RemoteProtocolError:
        return None


def roots_in_use(store: Store) -> frozenset[str]:
    """Return the checkpoints that jobs which are not over serve or resume from."""
    specs = (running_spec(store, job) for job in store.jobs.all())
    found = [(s.resume, s.serve.checkpoint) for s in specs if s is not None]
    named = {root.removeprefix("blob:") for roots in found for root in roots}
    return frozenset(named - {""})


@dataclass
class Checkpoints:
    """The services about checkpoints of one session."""

    flow: CheckpointFlow
    replication: Replication
    hot: HotService
    jobs: JobsService | None = None

    async def submit(self, spec: JobSpec) -> JobId:
        """Submit a job; one that resumes must fit its checkpoint.

        Raises:
            ConfigError: it does not fit, or the spec breaks a rule.
            Unavailable: nobody reachable holds the checkpoint.
        """
        assert self.jobs is not None
        if spec.checkpoint.erasure:
            check_code(*spec.checkpoint.pieces)
        if spec.resume:
            spec = msgspec.structs.replace(spec, resume=content_root(spec.resume))
            first = await self.flow.first_round(spec)
            spec = msgspec.structs.replace(spec, resume_round=first)
        return await self.jobs.submit(spec)

    def seat(self, job: JobId) -> Seat | None:
        """Return this peer's seat in a job that is not over."""
        return self.jobs.seat(job) if self.jobs is not None else None

    def works(self, job: JobId) -> bool:
        """Return whether a worker here holds a state of ``job``."""
        seat = self.seat(job)
        return seat is not None and seat.holds_state


async def make_checkpoints(
    home: Home,
    config: NodeConfig,
    signer: Signer,
    store: Store,
    blobs: BlobStore,
    content: ContentService,
    rpc: Rpc,
    bulk: BulkPaths,
    counters: Counters,
) -> Checkpoints:
    """Return the services; the jobs service is set when it exists, then they run."""
    own = signer.peer_id
    domains = partial(member_domains, store, own)
    in_use: Callable[[], frozenset[str]] = partial(roots_in_use, store)
    ports = ReplicationPorts(rpc, store.heads, blobs, content, domains, in_use)
    replication = Replication(config.replication, own, ports, counters)
    folder = home.state / "checkpoints"
    flow = CheckpointFlow(own, store, blobs, content, replication, folder)
    hot = hot_folder(home)
    await trio.to_thread.run_sync(claim_hot_folder, home, hot)
    kept = await trio.to_thread.run_sync(HotStore, hot, config.train.hot_memory_bytes)
    made: list[Checkpoints] = []
    hot_ports = HotPorts(
        rpc,
        bulk,
        domains,
        spec_of=partial(running_spec, store),
        works=lambda job: made[0].works(job),
        saved=HeadStates(own, store.heads, flow, folder),
    )
    made.append(Checkpoints(flow, replication, HotService(signer, kept, hot_ports)))
    return made[0]
