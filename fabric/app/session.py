"""The services of one mesh, opened in the order in which they need each other.

    host -> gossip, routing -> data plane -> RPC, paths, bulk -> store -> gate
         -> admission, content -> jobs -> connections to members

Leaving the block closes them backwards.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import trio

from attestation.admission import Local, Software
from attestation.gate import MembershipGate
from attestation.listing import measure_installed
from attestation.ports import AdmissionPorts
from attestation.service import AdmissionService
from attestation.software import AppraisalPolicy
from attestation.standings import Standings
from crdt_store.grants import Mesh
from crdt_store.service import Store, open_store
from crdt_store.views import Hardware, MemberRecord
from dht.blobs import BlobStore
from dht.service import ContentService, open_content
from fabric.app.checkpoint_flow import CheckpointFlow
from fabric.app.clock import serve_clock
from fabric.app.config import NodeConfig
from fabric.app.connector import MemberConnector, RedialingConnector
from fabric.app.home import Home
from fabric.app.job_store import ReplicatedJobStore
from fabric.app.membership_file import MeshMembership
from fabric.app.peer_book import PeerBook
from fabric.app.roster import (
    bootstrap_addrs,
    by_peer,
    known_members,
    live_members,
)
from fabric.app.serving import Serving
from fabric.app.session_gate import LateAuthority, SessionGate
from fabric.core.errors import FabricError, NoRoute, RemoteRefused, Unavailable
from fabric.core.ids import PeerId, short
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.jobs.runner import RunnerFactory
from fabric.jobs.service import JobsService
from fabric.net.bulk_paths import BulkService, open_bulk_paths
from fabric.net.data_plane import DataPlane, open_data_plane
from fabric.net.libp2p_host import Libp2pHost, open_host
from fabric.net.libp2p_kad import open_routing
from fabric.net.libp2p_pubsub import open_broadcast
from fabric.net.paths import WorkerPaths
from fabric.net.rpc import RpcService, open_rpc
from inference.service import ServeService
from inference.stage_service import RunnerPorts
from training.service import train_runner_factory

log = logging.getLogger(__name__)

HELLO = "node.hello"
"""RPC method that does nothing: it brings up the connection."""
ENDED = frozenset({"done", "failed", "cancelled"})
"""Job states that nothing can follow."""
GATE_SECONDS = 1.0
"""How often connections of peers that lost their standing are closed."""


class SessionOwner(Protocol):
    """What a session needs of its node."""

    home: Home
    config: NodeConfig
    signer: Ed25519Signer
    counters: Counters


@dataclass(frozen=True)
class Session:
    """The running services of one mesh."""

    mesh: Mesh
    own: PeerId
    config: NodeConfig
    gate: SessionGate
    standings: Standings
    host: Libp2pHost
    plane: DataPlane
    rpc: RpcService
    paths: WorkerPaths
    bulk: BulkService
    store: Store
    admission: AdmissionService
    blobs: BlobStore
    content: ContentService
    jobs: JobsService
    serving: Serving
    book: PeerBook
    connector: MemberConnector
    incarnation: int

    async def join_through(self, bootstrap: Sequence[str]) -> None:
        """Be admitted by any of ``bootstrap`` and take in the mesh's state.

        A member's no is an answer: only silence and failure send us to the next, who
        may not have heard yet what the first one knows.

        Raises:
            FabricError: why one of them refused, or that none answers.
        """
        error: FabricError = NoRoute(
            "the invite names no address", next_step="ask for a new token"
        )
        for addr in bootstrap:
            peer = PeerId(addr.rpartition("/p2p/")[2])
            try:
                await self.connector.meet(peer, (addr,))
                await self.store.sync_with(peer)
            except RemoteRefused:
                raise
            except FabricError as exc:
                error = exc
            else:
                await self.publish_record()
                return
        raise error

    def bootstrap(self) -> tuple[str, ...]:
        """Return addresses for an invite: ours, then one of each connected member.

        With several members a newcomer gets in while the inviter is away.
        """
        reached = self.rpc.connected()
        return bootstrap_addrs(self.store, reached, self.host.addrs())

    async def publish_record(self) -> None:
        """Write our membership record."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        record = MemberRecord(
            name=self.config.display_name,
            addrs=self.host.addrs()[:16],
            version=version("peerfabric"),
            hardware=Hardware(os.cpu_count() or 1, memory),
            incarnation=self.incarnation,
        )
        held = self.store.members.get(self.own)
        if held != record:
            await self.store.members.put(record)

    async def partition(self, peers: frozenset[PeerId]) -> None:
        """Cut contact with ``peers``; empty heals."""
        self.book.retry_now(self.gate.cut - peers)
        self.gate.partition(peers)
        for peer in peers:
            await self.disconnect(peer)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection with ``peer``."""
        await self.rpc.disconnect(peer)
        await self.bulk.disconnect(peer)
        await self.plane.disconnect(peer)
        await self.host.disconnect(peer)

    async def leave_jobs(self) -> None:
        """Take no part in any running job from its next round on."""
        for view in self.jobs.jobs():
            if view.state not in ENDED and self.own in view.participants:
                await self.jobs.leave(view.job)

    def resolve(self, subject: str) -> PeerId:
        """Return the member whose id, end of id, or name is ``subject``.

        Raises:
            Unavailable: none, or several.
        """
        members = self.store.members.all()
        found = {
            peer
            for peer in self.store.authority.members() | set(members)
            if peer.endswith(subject)
            or (peer in members and members[peer].name == subject)
        }
        if len(found) != 1:
            raise Unavailable(
                f"{len(found)} members match {subject!r}",
                code="E_NO_PEER",
                next_step="`fabric status` lists the members",
            )
        return found.pop()


@asynccontextmanager
async def open_session(
    node: SessionOwner, membership: MeshMembership
) -> AsyncIterator[Session]:
    """Run the services of ``membership``'s mesh while inside.

    Raises:
        ConfigError: an address cannot be listened on, or the data folder is damaged.
    """
    async with AsyncExitStack() as stack:
        session = await _open(stack, node, membership)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(session.admission.run)
        await nursery.start(session.jobs.run)
        await nursery.start(session.connector.run)
        await nursery.start(session.serving.run)
        nursery.start_soon(_close_refused, session)
        nursery.start_soon(_refresh_record, session)
        try:
            yield session
        finally:
            nursery.cancel_scope.cancel()


async def _open(
    stack: AsyncExitStack, node: SessionOwner, membership: MeshMembership
) -> Session:
    config, signer, counters = node.config, node.signer, node.counters
    enter = stack.enter_async_context
    own = signer.peer_id
    authority = LateAuthority()
    standings = Standings(config.attestation.reattest_interval_seconds)
    gate = SessionGate(
        MembershipGate(
            authority.membership,
            authority,
            standings,
            trio.current_time,
            own=own,
            allow_suspect=config.attestation.allow_suspect,
        )
    )
    host = await enter(open_host(config.host, signer, gate, counters))
    broadcast = await enter(open_broadcast(host, config.gossip))
    routing = await enter(open_routing(host, config.routing))
    plane = await enter(open_data_plane(config.data, signer, host, gate, counters))
    book = PeerBook(own)
    book.learn(by_peer(membership.bootstrap))
    connect = RedialingConnector(host, plane, book)
    rpc = await enter(open_rpc(config.data.rpc, own, connect, gate, counters))
    plane.serve_rpc(rpc.accept)
    rpc.register(HELLO, lambda peer, request: b"")
    serve_clock(rpc)
    paths = WorkerPaths(plane)
    bulk = await enter(open_bulk_paths(plane))
    folder = node.home.data / "meshes" / membership.mesh.id[:16]
    store = await enter(
        open_store(
            config.store,
            folder / "store",
            signer,
            membership.mesh,
            rpc,
            broadcast,
            time.time,
            counters,
        )
    )
    authority.store = store
    store.ingest_authority_untrusted(membership.credentials)
    measurement = await trio.to_thread.run_sync(measure_installed)
    allowed = frozenset(map(bytes.fromhex, config.attestation.allowed_measurements))
    software = Software(measurement, version("peerfabric"), AppraisalPolicy(allowed))
    admission = AdmissionService(
        host,
        Local(signer, membership.mesh.id, software),
        AdmissionPorts(
            membership=store.authority.membership,
            credential=lambda: store.credential() or membership.credentials,
            ingest_untrusted=store.ingest_shown_untrusted,
            authority_entries=store.authority_entries,
            verdicts=store.verdicts,
        ),
        standings,
        config.attestation,
        counters,
    )
    blobs = await trio.to_thread.run_sync(
        BlobStore, node.home.data / "content", config.content.max_bytes
    )
    content = await enter(
        open_content(config.content, blobs, rpc, bulk, routing, gate, counters, own=own)
    )
    flow = CheckpointFlow(own, store, blobs, content, node.home.state / "checkpoints")
    serve = ServeService(
        own, rpc, RunnerPorts(paths, signer, flow.obtain, time.time, config.serve)
    )
    serve.register()
    jobs = JobsService(
        config.jobs,
        signer=signer,
        rpc=rpc,
        store=ReplicatedJobStore(store),
        runners=_installed(
            train=train_runner_factory(paths, signer, config.train),
            serve=serve.open_runner,
        ),
        members=partial(live_members, store, rpc, own),
        scratch_root=node.home.jobs,
        on_checkpoint=flow.publish,
        counters=counters,
    )
    connector = MemberConnector(
        host,
        admission,
        book,
        partial(known_members, store),
        ready=rpc.connected,
        greet=lambda peer: rpc.call(peer, HELLO, b""),
        blocked=lambda: gate.cut,
        timeout_seconds=config.mesh.connect_seconds,
    )
    serving = Serving(own, rpc, serve, jobs, config.serve)
    return Session(
        membership.mesh,
        own,
        config,
        gate,
        standings,
        host,
        plane,
        rpc,
        paths,
        bulk,
        store,
        admission,
        blobs,
        content,
        jobs,
        serving,
        book,
        connector,
        _next_incarnation(folder / "incarnation"),
    )


def _next_incarnation(path: Path) -> int:
    """Count one more start of this peer in this mesh."""
    count = int(path.read_text()) + 1 if path.exists() else 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(count))
    return count


def _installed(**runners: RunnerFactory) -> dict[str, RunnerFactory]:
    """Return ``runners`` if what their workers import is installed, else none.

    Without them this peer is a member that takes no jobs, and a submit says what to
    install.
    """
    needed = ("torch", "transformers", "safetensors")
    return runners if all(find_spec(name) is not None for name in needed) else {}


async def _close_refused(session: Session) -> None:
    """Close the connections of peers that the gate no longer allows."""
    while True:
        for peer, decision in session.gate.changes():
            log.info("gate.closed peer=%s code=%s", short(peer), decision.code)
            await session.disconnect(peer)
        await trio.sleep(GATE_SECONDS)


async def _refresh_record(session: Session) -> None:
    """Publish our membership record once we may, then every refresh period."""
    while True:
        if session.store.authority.membership(session.own).allowed:
            try:
                await session.publish_record()
            except FabricError as exc:
                log.warning("record.failed code=%s reason=%s", exc.code, exc.reason)
            else:
                await trio.sleep(session.config.mesh.record_refresh_seconds)
        await trio.sleep(GATE_SECONDS)
