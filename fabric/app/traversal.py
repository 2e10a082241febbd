"""Traversal in a session: what it needs of the mesh, and what the doctor asks of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import trio

from crdt_store.service import Store
from fabric.app.connector import MemberConnector
from fabric.app.doubts import Doubts
from fabric.app.known_addrs import Source
from fabric.app.membership_file import MeshMembership
from fabric.app.peer_book import PeerBook
from fabric.app.roster import by_peer, rendezvous_groups
from fabric.core.ids import PeerId
from fabric.net.data_plane import DataPlane
from fabric.net.ports import LinkMeasurement, LinkProbe
from fabric.net.rpc import RpcService
from nat.config import NatConfig
from nat.discovery.core import Islands, namespace_of, order_points
from nat.doctor.facts import (
    CircuitTried,
    Mdns,
    PortMapping,
    Punched,
    Reachability,
    Relaying,
    Relays,
)
from nat.doctor.sources import (
    from_circuits,
    from_mappings,
    from_mdns,
    from_nat_facts,
    from_punch,
    from_relays,
    from_report,
)
from nat.ports import TraversalNeeds
from nat.reachability.netwatch import NetworkChanged
from nat.relay.circuit_addresses import CIRCUIT
from nat.service import Traversal

RELAY_ROLE = "relay"
"""In a member's record: it relays for others."""
MAX_OBSERVERS = 4
"""Data-plane listeners that are asked how they see us; two that differ suffice."""


class MeshKnowledge:
    """What traversal asks of the mesh, answered from the store and the peer book.

    Args:
        own: Our id.
        membership: The mesh, and the addresses of its invite.
        store: Members' records.
        book: Addresses of peers.
        rpc: Who is on a relay.
        config: Configured bootstraps.
    """

    def __init__(
        self,
        own: PeerId,
        membership: MeshMembership,
        store: Store,
        book: PeerBook,
        rpc: RpcService,
        config: NatConfig,
    ) -> None:
        self._own = own
        self._invited = membership.bootstrap
        self._configured = config.discovery.bootstrap
        self._namespace = namespace_of(membership.mesh.id)
        self._store = store
        self._book = book
        self._rpc = rpc

    def needs(
        self, connector: MemberConnector, plane: DataPlane, doubts: Doubts
    ) -> TraversalNeeds:
        """Return what :func:`nat.service.open_traversal` takes."""

        def network_changed(change: NetworkChanged) -> None:
            plane.registry.shut_down_from(change.gone_addresses)
            doubts.about_all()
            connector.retry_now()

        return TraversalNeeds(
            addresses_of=self.addresses_of,
            relays=self.relays,
            observers=self.observers,
            points=self.points,
            is_member=lambda peer: self._store.authority.membership(peer).allowed,
            learn=self._learn,
            relayed=self.relayed,
            direct=lambda: self._rpc.connected() - self.relayed(),
            upgrade=self._rpc.upgrade,
            network_changed=network_changed,
        )

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Return the multiaddrs at which ``peer`` may be, its own word first."""
        record = self._store.members.get(peer)
        announced = record.addrs if record is not None else ()
        return tuple(dict.fromkeys((*announced, *self._book.addrs_of(peer))))

    def relays(self) -> Mapping[PeerId, Sequence[str]]:
        """Return who may relay for us: volunteers, then whom we joined through."""
        members = self._store.members.live()
        found: dict[PeerId, Sequence[str]] = {
            peer: record.addrs
            for peer, record in sorted(members.items())
            if RELAY_ROLE in record.roles
        }
        for peer, addrs in by_peer((*self._configured, *self._invited)).items():
            direct = [addr for addr in addrs if CIRCUIT not in addr]
            if direct:
                found.setdefault(peer, direct)
        found.pop(self._own, None)
        return found

    def observers(self) -> tuple[str, ...]:
        """Return data-plane listeners the world reaches, connected peers' first."""
        live = self._rpc.connected()
        members = self._store.members.all()
        records = sorted(members.items(), key=lambda item: (item[0] not in live, item))
        found = (
            record.data_addrs[0]
            for peer, record in records
            if peer != self._own and record.data_addrs
        )
        return tuple(dict.fromkeys(found))[:MAX_OBSERVERS]

    def points(self) -> tuple[PeerId, ...]:
        """Return candidates for rendezvous points."""
        groups = rendezvous_groups(
            self._configured, self._invited, self.relays(), self._book
        )
        return order_points(self._namespace, groups, self._own)

    def relayed(self) -> frozenset[PeerId]:
        """Return the peers whose RPC is on a relay."""
        live = self._rpc.connected()
        return frozenset(peer for peer in live if self._rpc.kind(peer) == "relay")

    def _learn(self, source: str, found: Mapping[PeerId, Sequence[str]]) -> None:
        known: Source = "mdns" if source == "mdns" else "rendezvous"
        chosen = self._book.chosen
        if chosen is not None:  # of a large mesh only those that we would dial
            members = self._store.members.all().keys() - chosen
            found = {peer: a for peer, a in found.items() if peer not in members}
        self._book.learn(found, source=known, wall=time.time())


class TraversalReport:
    """Implements ``diagnose.Traversal``: the parts' reports in the doctor's words.

    Args:
        traversal: The running service.
        probe: Measures links.
        config: How many relays are wanted.
    """

    def __init__(
        self, traversal: Traversal, probe: LinkProbe, config: NatConfig
    ) -> None:
        self.service = traversal
        self._probe = probe
        self._config = config

    def reachability(self) -> Reachability | None:
        """Return the verdict on our own address and NAT."""
        return from_report(self.service.reachability.verdict())

    def port_mapping(self) -> PortMapping | None:
        """Return what the router grants."""
        mapping = self.service.mapping
        return from_mappings(mapping.mappings(), mapping.report()[0])

    def relays(self) -> Relays | None:
        """Return our reservations and who refused one."""
        status = self.service.circuits.reservations.status()
        return from_relays(status, self._config.circuit.num_relays)

    def relaying(self) -> Relaying:
        """Return what we do for others."""
        relay, config = self.service.relay, self._config.relay
        return Relaying(
            active=relay.active,
            volunteer=config.volunteer,
            reservations=relay.book.num_reservations,
            circuits=len(relay.book.circuits),
            max_bytes_per_second=config.max_bytes_per_second,
        )

    def peer_nat(self, peer: PeerId) -> Reachability | None:
        """Return what ``peer`` said of its NAT when it was last punched."""
        known = self.service.history.of(peer)
        return None if known is None or known.nat is None else from_nat_facts(known.nat)

    def circuits(self, peer: PeerId) -> tuple[CircuitTried, ...] | None:
        """Return the relays that were last tried towards ``peer``."""
        known = self.service.history.of(peer)
        return () if known is None else from_circuits(known, trio.current_time())

    def punched(self, peer: PeerId) -> Punched | None:
        """Return what the last hole punch towards ``peer`` came to."""
        reason = self.service.upgrades.reason(peer) or self.service.dcutr.reason(peer)
        known = self.service.history.of(peer)
        return from_punch(known, reason, trio.current_time())

    def islands(self) -> Islands:
        """Return how the mesh looks from the rendezvous points."""
        return self.service.discovery.islands()

    def mdns(self) -> Mdns:
        """Return how it stands with the local network."""
        return from_mdns(self.service.mdns.report())

    def link(self, peer: PeerId) -> LinkMeasurement | None:
        """Return the last measurement of the link with ``peer``."""
        return self._probe.link(peer)
