"""The services of one mesh, and what can be asked of all of them together.

``session_open.py`` opens them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import trio

from attestation.service import AdmissionService
from attestation.standings import Standings
from crdt_store.grants import Mesh
from crdt_store.service import Store
from crdt_store.views import Hardware, MemberRecord
from dht.blobs import BlobStore
from dht.service import ContentService
from fabric.app.checkpoints import Checkpoints
from fabric.app.config import NodeConfig
from fabric.app.connector import MemberConnector
from fabric.app.doubts import Doubts
from fabric.app.joining import join_any
from fabric.app.neighbourhood import Neighbourhood
from fabric.app.peer_book import PeerBook
from fabric.app.peers_file import PeersFile
from fabric.app.roster import (
    bootstrap_addrs,
)
from fabric.app.serving import Serving
from fabric.app.session_gate import SessionGate
from fabric.app.traversal import RELAY_ROLE, TraversalReport
from fabric.core.errors import FabricError, Unavailable
from fabric.core.ids import JobId, PeerId
from fabric.jobs.service import JobsService
from fabric.net.bulk_paths import BulkService
from fabric.net.data_plane import DataPlane
from fabric.net.libp2p_host import Libp2pHost
from fabric.net.paths import WorkerPaths
from fabric.net.rpc import RpcService
from nat.probe.service import ProbeService

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 3.0
"""Longest time to tell the mesh that we leave."""
HELLO = "node.hello"
"""RPC method that does nothing: it brings up the connection."""
ENDED = frozenset({"done", "failed", "cancelled"})
"""Job states that nothing can follow."""


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
    checkpoints: Checkpoints
    jobs: JobsService
    serving: Serving
    book: PeerBook
    peers_file: PeersFile
    hood: Neighbourhood
    connector: MemberConnector
    doubts: Doubts
    nat: TraversalReport
    probe: ProbeService
    incarnation: int

    async def join_through(self, bootstrap: Sequence[str]) -> None:
        """Be admitted by any of ``bootstrap`` and take in the mesh's state.

        Raises:
            FabricError: why a member refused, or that none answers.
        """

        async def admit(peer: PeerId, addrs: Sequence[str]) -> None:
            await self.connector.meet(peer, addrs)
            await self.store.sync_with(peer)

        known = (*bootstrap, *self.config.nat.discovery.bootstrap)
        await join_any(known, admit, seconds=self.config.mesh.connect_seconds)
        await self.publish_record()

    def bootstrap(self) -> tuple[str, ...]:
        """Return addresses for an invite: ours, then one of each connected member.

        With several members a newcomer gets in while the inviter is away.
        """
        reached = self.rpc.connected()
        return bootstrap_addrs(self.store, reached, self.host.addrs())

    def record(self) -> MemberRecord:
        """Return our membership record as it should be now."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        nat = self.nat.service
        return MemberRecord(
            name=self.config.display_name,
            addrs=self.host.addrs()[:16],
            version=version("peerfabric"),
            hardware=Hardware(os.cpu_count() or 1, memory),
            incarnation=self.incarnation,
            roles=(RELAY_ROLE,) if nat.relay.active else (),
            data_addrs=nat.vantage.data_addresses(),
        )

    def record_changed(self) -> bool:
        """Return whether others hold another record of us than the right one."""
        return self.store.members.get(self.own) != self.record()

    async def publish_record(self) -> None:
        """Write our membership record."""
        await self.store.members.put(self.record())

    async def say_goodbye(self) -> None:
        """Tell the mesh that we leave, as far as GOODBYE_SECONDS allow."""
        with trio.move_on_after(GOODBYE_SECONDS):
            await self.store.members.put(MemberRecord(name="", left=True))
            for peer in sorted(self.rpc.connected()):
                try:
                    await self.store.sync_with(peer)
                except FabricError:
                    continue  # the next one
                return  # it tells the others

    def running_jobs(self) -> dict[JobId, tuple[PeerId, ...]]:
        """Return the jobs in which we take part now, with their participants."""
        return {
            view.job: view.participants
            for view in self.jobs.jobs()
            if view.state not in ENDED and self.own in view.participants
        }

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
        for job in self.running_jobs():
            await self.jobs.leave(job)

    def resolve(self, subject: str) -> PeerId:
        """Return the member, or who was one, whose id, its end, or name is ``subject``.

        Raises:
            Unavailable: none, or several.
        """
        members = self.store.members.ever()
        known = self.store.authority.members() | set(members)
        # a short name may end somebody's id by chance
        found = {peer for peer, record in members.items() if record.name == subject}
        found = found or {peer for peer in known if peer.endswith(subject)}
        if len(found) != 1:
            raise Unavailable(
                f"{len(found)} members match {subject!r}",
                code="E_NO_PEER",
                next_step="`fabric status` lists the members",
            )
        return found.pop()
