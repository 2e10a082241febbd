"""The services of one mesh, opened in the order in which they need each other.

    host -> gossip, routing -> data plane -> RPC, paths, bulk -> store -> gate
         -> admission, content -> jobs -> connections to members

Leaving the block closes them backwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Protocol

import trio

from attestation.admission import Local, Software
from attestation.gate import MembershipGate
from attestation.listing import measure_installed
from attestation.ports import AdmissionPorts
from attestation.service import AdmissionService
from attestation.software import AppraisalPolicy
from attestation.standings import Standings
from crdt_store.liveness.messages import METHOD as ALIVE_METHOD
from crdt_store.liveness.messages import Load
from crdt_store.messages import SYNC_METHOD
from crdt_store.service import open_store
from dht.blobs import BlobStore
from dht.service import ContentService, open_content
from fabric.app.checkpoints import make_checkpoints
from fabric.app.clock import serve_clock
from fabric.app.config import NodeConfig
from fabric.app.connector import MemberConnector
from fabric.app.domains import site_members
from fabric.app.doubts import Doubts
from fabric.app.home import Home
from fabric.app.job_store import ReplicatedJobStore
from fabric.app.last_ports import LastPorts, load_ports, port_of, save_ports, settle
from fabric.app.link_survey import serve_survey
from fabric.app.links import publish_links
from fabric.app.membership_file import MeshMembership
from fabric.app.neighbour_keeper import RELEASE, NeighbourKeeper
from fabric.app.neighbourhood import Neighbourhood
from fabric.app.peer_book import PeerBook
from fabric.app.peers_file import PeersFile
from fabric.app.roster import (
    by_peer,
    live_members,
)
from fabric.app.serving import Serving
from fabric.app.session import HELLO, Session
from fabric.app.session_gate import LateAuthority, LateRank, SessionGate
from fabric.app.session_keepers import close_refused, needed_peers, refresh_record
from fabric.app.traversal import MeshKnowledge, TraversalReport
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.jobs.runner import RunnerFactory
from fabric.jobs.service import JobsService
from fabric.net.bulk_paths import BulkService, open_bulk_paths
from fabric.net.data_plane import DataPlane, open_data_plane
from fabric.net.libp2p_dialback import DialBack
from fabric.net.libp2p_host import Libp2pHost, open_host
from fabric.net.libp2p_identify import identify
from fabric.net.libp2p_kad import Libp2pRouting, open_routing
from fabric.net.libp2p_pubsub import open_broadcast
from fabric.net.paths import WorkerPaths
from fabric.net.ports import Broadcast
from fabric.net.rpc import RpcService, open_rpc
from fabric.net.tasks import collapse_group
from inference.service import ServeService
from inference.stage_service import RunnerPorts
from nat.ports import TraversalBase
from nat.probe.service import LinkSenses, open_link_probe
from nat.service import open_traversal
from training.service import train_runner_factory

log = logging.getLogger(__name__)


class SessionOwner(Protocol):
    """What a session needs of its node."""

    home: Home
    config: NodeConfig
    signer: Ed25519Signer
    counters: Counters


@asynccontextmanager
async def open_session(
    node: SessionOwner, membership: MeshMembership
) -> AsyncIterator[Session]:
    """Run the services of ``membership``'s mesh while inside.

    Raises:
        ConfigError: an address cannot be listened on, or the data folder is damaged.
    """
    # one error in one service is that error, for whoever asked for the session
    with collapse_group():
        async with _opened(node, membership) as session:
            yield session


@asynccontextmanager
async def _opened(
    node: SessionOwner, membership: MeshMembership
) -> AsyncIterator[Session]:
    async with AsyncExitStack() as stack:
        session = await _open(stack, node, membership)
        serve_survey(session.rpc, session.probe, session.store.authority.members)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(session.admission.run)
        await nursery.start(session.checkpoints.hot.run)
        await nursery.start(session.checkpoints.replication.run)
        await nursery.start(session.jobs.run)
        await nursery.start(session.peers_file.run)
        nursery.start_soon(session.hood.run)
        await nursery.start(session.connector.run)
        await nursery.start(session.serving.run)
        nursery.start_soon(close_refused, session)
        nursery.start_soon(refresh_record, session)
        keeper = NeighbourKeeper(
            session.hood,
            session.host,
            session.rpc,
            session.plane.registry,
            lambda: needed_peers(session),
            session.config.mesh.idle_seconds,
        )
        nursery.start_soon(keeper.run)
        nursery.start_soon(session.doubts.run)
        nursery.start_soon(
            publish_links,
            session.probe,
            session.store.links,
            session.running_jobs,
            session.config.nat.probe,
            partial(site_members, session.store, session.own),
        )
        try:
            yield session
        finally:
            nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class _Network:
    """The services below the replicated state."""

    host: Libp2pHost
    broadcast: Broadcast
    routing: Libp2pRouting
    plane: DataPlane
    rpc: RpcService
    bulk: BulkService

    def reach_through(self, connector: MemberConnector) -> None:
        """Connect with whoever is called, or offered a socket, and is not connected."""
        self.plane.set_opener(connector.open_stream)
        self.rpc.meet = self.routing.meet = connector.reach


async def _open_network(
    stack: AsyncExitStack,
    node: SessionOwner,
    gate: SessionGate,
) -> _Network:
    """Listen on both planes, where the last run did if that is free."""
    config, signer, counters = node.config, node.signer, node.counters
    enter = stack.enter_async_context
    ports_file = node.home.data / "ports.json"
    host_config, data_config = settle(config.host, config.data, load_ports(ports_file))
    host = await enter(open_host(host_config, signer, gate, counters))
    broadcast = await enter(open_broadcast(host, config.gossip))
    routing = await enter(open_routing(host, config.routing))
    plane = await enter(open_data_plane(data_config, signer, host, gate, counters))
    save_ports(ports_file, LastPorts(port_of(host.listen_addrs()), plane.port))
    rpc = await enter(open_rpc(config.data.rpc, signer.peer_id, plane, gate, counters))
    rpc.background = frozenset({SYNC_METHOD, ALIVE_METHOD, RELEASE})
    plane.serve_rpc(rpc.accept)
    rpc.register(HELLO, lambda peer, request: b"")
    serve_clock(rpc)
    bulk = await enter(open_bulk_paths(plane))
    return _Network(host, broadcast, routing, plane, rpc, bulk)


async def _open_content(
    stack: AsyncExitStack, node: SessionOwner, net: _Network, gate: SessionGate
) -> tuple[BlobStore, ContentService]:
    config = node.config.content
    blobs = await trio.to_thread.run_sync(
        BlobStore, node.home.data / "content", config.max_bytes
    )
    service = open_content(
        config,
        blobs,
        net.rpc,
        net.bulk,
        net.routing,
        gate,
        node.counters,
        own=node.signer.peer_id,
    )
    return blobs, await stack.enter_async_context(service)


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
    folder = node.home.data / "meshes" / membership.mesh.id[:16]
    folder.mkdir(parents=True, exist_ok=True)
    book = PeerBook(own)
    book.learn(by_peer(membership.bootstrap))
    peers_file = PeersFile(folder / "peers.json", book)
    rank = LateRank()
    net = await _open_network(stack, node, gate)
    host, plane, rpc, bulk = net.host, net.plane, net.rpc, net.bulk
    paths = WorkerPaths(plane)
    incarnation = _next_incarnation(folder / "incarnation")
    store = await enter(
        open_store(
            config.store,
            folder / "store",
            signer,
            membership.mesh,
            rpc,
            net.broadcast,
            time.time,
            counters,
            incarnation=incarnation,
        )
    )
    authority.store = store
    hood = Neighbourhood(
        own, config.mesh.max_neighbours, store, book, rpc.connected, lambda: gate.cut
    )
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
    blobs, content = await _open_content(stack, node, net, gate)
    kept = await make_checkpoints(
        node.home, config, signer, store, blobs, content, rpc, bulk, counters
    )
    serve = ServeService(
        own, rpc, RunnerPorts(paths, signer, kept.flow.obtain, time.time, config.serve)
    )
    serve.register()
    jobs = JobsService(
        config.jobs,
        signer=signer,
        rpc=rpc,
        store=ReplicatedJobStore(store),
        runners=_installed(
            train=train_runner_factory(
                paths,
                signer,
                config.train,
                obtain=kept.flow.obtain_resumed,
                hot=kept.hot,
            ),
            serve=serve.open_runner,
        ),
        members=partial(live_members, store, rpc, own, hood),
        scratch_root=node.home.jobs,
        on_checkpoint=kept.flow.publish,
        hot=kept.hot,
        counters=counters,
    )
    kept.jobs = jobs
    connector = MemberConnector(
        host,
        admission,
        book,
        hood.members,
        ready=rpc.connected,
        greet=lambda peer: rpc.call(peer, HELLO, b""),
        blocked=lambda: gate.cut,
        timeout_seconds=config.mesh.connect_seconds,
        rank=rank,
        connections=host.connections,
        chosen=hood.chosen,
        permit=gate.may_meet,
    )
    net.reach_through(connector)
    senses = LinkSenses(rpc, paths, plane.registry.traffic)
    probe = await enter(
        open_link_probe(config.nat.probe, own, bulk, senses, counters, Random())
    )
    doubts = Doubts(host, rpc, plane, lambda peer: nat.puncher.doubt(peer))
    knowledge = MeshKnowledge(own, membership, store, book, rpc, config.nat)
    nat = await enter(
        open_traversal(
            config.nat_in_budget,
            TraversalBase(
                host,
                plane,
                gate,
                signer,
                membership.mesh.id,
                partial(identify, host),
                DialBack(config.host),
                counters,
            ),
            knowledge.needs(connector, plane, doubts),
            config.host.announce,
        )
    )
    rank.vantage = nat.vantage
    serving = Serving(own, rpc, serve, jobs, config.serve)
    store.liveness.load_source = lambda: Load(serve.num_waiting(), jobs.num_running())
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
        kept,
        jobs,
        serving,
        book,
        peers_file,
        hood,
        connector,
        doubts,
        TraversalReport(nat, probe, config.nat_in_budget),
        probe,
        incarnation,
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
