"""Traversal as one service: what brings this peer and others together.

    network watch --> reachability --> announced addresses, volunteering as a relay
                  --> port mapping, punching, circuits, discovery: all start again
    PathProvider: rank, punch, circuit      for the data plane
    DCUtR, upgrades                         relayed connections become direct ones

Each part is a module with a shell of its own; here they are connected, and nothing is
decided that a core could decide.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, short
from fabric.net.ports import PROTOCOL_OFFER
from fabric.net.tasks import collapse_group
from fabric.net.traversal_api import ConnectionKind
from nat.addresses import (
    AddressClass,
    classify,
    endpoint_of,
)
from nat.config import NatConfig
from nat.discovery.mdns_service import MdnsService
from nat.discovery.service import DiscoveryPorts, DiscoveryService
from nat.history import History
from nat.multiaddr_bytes import tcp_multiaddr
from nat.portmap.lease import WantedPort
from nat.portmap.service import PortMapping, open_port_mapping
from nat.ports import TraversalBase, TraversalNeeds
from nat.punch.control_service import ControlPathService
from nat.punch.dcutr_round_service import ControlSurroundings
from nat.punch.dcutr_service import DcutrService
from nat.punch.exchange_service import Surroundings as PunchSurroundings
from nat.punch.service import TcpPuncher
from nat.punch.upgrade_service import UpgradeService
from nat.reachability.autonat_service import AutonatService
from nat.reachability.netwatch import NetworkChanged
from nat.reachability.netwatch_service import NetworkWatcher, open_netwatch
from nat.reachability.service import (
    ReachabilityService,
    Surroundings,
    open_reachability,
)
from nat.relay.circuit_service import CircuitService
from nat.relay.messages import PROTOCOL_VIA
from nat.relay.service import RelayService
from nat.vantage import Vantage, control_port

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0
"""How often the candidates for relays and our announcement are looked at."""


class Traversal:
    """Implements ``fabric.net.ports.PathProvider``; made by :func:`open_traversal`.

    Attributes:
        reachability: Whether others can reach us, and how our NAT maps.
        mapping: What routers forward to us.
        vantage: Our addresses and our NAT, in short.
        relay: What we do for others.
        circuits: Our reservations at relays.
        puncher: Hole punching of data-plane sockets.
        dcutr: Hole punching of control connections.
        control: Those that need the data plane's path instead.
        upgrades: Who moves off a relay when.
        discovery: Rendezvous.
        mdns: The local network.
        history: What was last tried towards each peer.
    """

    def __init__(
        self,
        config: NatConfig,
        base: TraversalBase,
        needs: TraversalNeeds,
        network: NetworkWatcher,
        mapping: PortMapping,
        reachability: ReachabilityService,
    ) -> None:
        self._base = base
        self._needs = needs
        self._network = network
        self._nursery: trio.Nursery | None = None
        self._circuit_addrs: tuple[str, ...] = ()
        self.mapping = mapping
        self.reachability = reachability
        host, counters = base.host, base.counters
        self.history = History()
        here = self.vantage = Vantage(
            host,
            base.plane,
            network,
            mapping,
            reachability,
            needs.addresses_of,
            lambda peer: base.gate.allows(peer, PROTOCOL_VIA).allowed,
        )
        AutonatService(host, base.dial_back, config.reachability.autonat, counters)
        self.relay = RelayService(
            host, base.signer, self._may_relay, config.relay, counters
        )
        self.circuits = CircuitService(
            host,
            base.gate,
            config.circuit,
            counters,
            addresses_of=needs.addresses_of,
            neighbours=here.neighbours,
            on_data=self._on_circuit,
            on_addresses=self._set_circuits,
            history=self.history,
        )
        self.puncher = TcpPuncher(
            host,
            config.punch,
            PunchSurroundings(
                needs.observers, here.local_ips, here.facts, here.data_addresses
            ),
            self._on_punched,
            counters,
            history=self.history,
        )
        self.dcutr = DcutrService(
            host,
            config.punch,
            ControlSurroundings(
                port=here.control_port,
                observed=here.observed,
                local_ips=here.local_ips,
                announced=needs.addresses_of,
                settled=here.is_settled,
            ),
            counters,
            history=self.history,
        )
        self.control = ControlPathService(host, base.plane, config.punch, needs.direct)
        self.upgrades = UpgradeService(config.punch, needs.relayed, needs.upgrade)
        self.discovery = DiscoveryService(
            host,
            base.signer,
            base.mesh,
            config.discovery,
            DiscoveryPorts(
                needs.points,
                needs.addresses_of,
                needs.is_member,
                lambda found: needs.learn("rendezvous", found),
            ),
        )
        self.mdns = MdnsService(
            host.peer_id,
            base.mesh,
            config.discovery,
            host.addrs,
            lambda found: needs.learn("mdns", found),
        )

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Traverse until cancelled."""
        self._base.plane.set_path_provider(self)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for part in (
                self.relay,
                self.circuits,
                self.puncher,
                self.dcutr,
                self.control,
                self.upgrades,
                self.discovery,
                self.mdns,
            ):
                await nursery.start(part.run)
            nursery.start_soon(self._follow_network)
            nursery.start_soon(self._follow_verdicts)
            nursery.start_soon(self._follow_mappings)
            task_status.started()
            await self._settle()

    # what the data plane asks: PathProvider

    def rank(self, peer: PeerId, addresses: Sequence[str]) -> tuple[str, ...]:
        """Return those of ``peer``'s addresses worth a dial, best first."""
        return self.vantage.rank(peer, addresses)

    async def punch(self, peer: PeerId) -> socket.socket:
        """Return a socket through both NATs; see ``TcpPuncher.punch``."""
        return await self.puncher.punch(peer)

    def claim(self, label: bytes, sock: socket.socket) -> bool:
        """Take ``sock`` if ``label`` is the nonce of a punch."""
        return self.puncher.claim(label, sock)

    async def circuit(self, peer: PeerId) -> socket.socket:
        """Return a socket that a relay carries; see ``CircuitService.open_data``."""
        return await self.circuits.open_data(peer)

    def relays_with(self, peer: PeerId) -> bool:
        """Return whether a relay's promise or a circuit joins us and ``peer``."""
        ours = self.circuits.reservations.expects(peer)
        return ours or self.relay.book.serves(peer)

    # what the parts tell

    def _may_relay(self, peer: PeerId) -> bool:
        return self._base.gate.allows(peer, PROTOCOL_OFFER).allowed

    async def _on_circuit(self, peer: PeerId, sock: socket.socket) -> None:
        await self._base.plane.accept_socket(sock, "relay")

    async def _on_punched(self, sock: socket.socket, seconds: float) -> None:
        await self._base.plane.accept_socket(sock, "punched", seconds)

    def _set_circuits(self, addrs: tuple[str, ...]) -> None:
        self._circuit_addrs = addrs
        self._announce()

    def _announce(self) -> None:
        self._base.host.announce(self.reachability.announced(self._circuit_addrs))

    async def _settle(self) -> None:
        """Offer the known relays to the circuit client, and tell our addresses."""
        before: Mapping[PeerId, Sequence[str]] | None = None
        while True:
            relays = self._needs.relays()
            if relays != before:
                before = relays
                self.circuits.set_candidates(relays)
            self._announce()
            await trio.sleep(SETTLE_SECONDS)

    async def _follow_verdicts(self) -> None:
        with self.reachability.changes() as changes:
            async for verdict in changes:
                # reached by all who may ask; who volunteers is reached by the world
                self.relay.set_public(verdict.open_to_the_internet)
                self.circuits.set_wanted(not verdict.open_to_all)
                self._announce()

    async def _follow_mappings(self) -> None:
        async for _ in self.mapping.events():
            self._base.plane.advertise(self.vantage.mapped_to(self._base.plane.port))
            self.reachability.nudge()

    async def _follow_network(self) -> None:
        with self._network.changes() as changes:
            async for change in changes:
                log.info(
                    "network.changed gone=%s new=%s gateway=%s",
                    ",".join(sorted(change.gone_addresses)),
                    ",".join(sorted(change.new_addresses)),
                    change.gateway_changed,
                )
                await self._leave_dead_connections(change)
                self.mapping.on_network_change()
                for part in (
                    self.circuits,
                    self.puncher,
                    self.dcutr,
                    self.control,
                    self.upgrades,
                    self.discovery,
                    self.mdns,
                ):
                    part.network_changed()
                self._needs.network_changed(change)

    async def _leave_dead_connections(self, change: NetworkChanged) -> None:
        """Close what left from an address that is gone: it would only time out."""
        host = self._base.host
        for peer in host.connected():
            dead: set[ConnectionKind] = {
                info.kind
                for info in host.connections(peer)
                if (end := endpoint_of(info.local)) is not None
                and str(end[0]) in change.gone_addresses
            }
            for kind in dead:
                try:
                    await host.close_connections(peer, kind)
                except FabricError as exc:
                    log.debug("network.close peer=%s error=%s", short(peer), exc)


@asynccontextmanager
async def open_traversal(
    config: NatConfig,
    base: TraversalBase,
    needs: TraversalNeeds,
    announced: Sequence[str],
) -> AsyncIterator[Traversal]:
    """Run traversal inside the block.

    Args:
        config: The settings.
        base: The services below.
        needs: What it needs from above.
        announced: Multiaddrs that the operator set.
    """
    loopback = all(
        classify(end[0]) is AddressClass.LOOPBACK
        for end in map(endpoint_of, base.host.listen_addrs())
        if end is not None
    )
    ports = (control_port(base.host), base.plane.port)
    wanted = [WantedPort(internal_port=port) for port in ports]
    asks = config.mapping.enabled and not loopback  # nobody beyond this host dials us
    forwarding = msgspec.structs.replace(config.mapping, enabled=asks)
    with collapse_group():
        async with (
            open_netwatch(base.counters) as network,
            open_port_mapping(forwarding, wanted, counters=base.counters) as mapped,
        ):
            around = Surroundings(
                interfaces=lambda: tuple(sorted(network.view().addresses)),
                mapped=lambda: tuple(
                    tcp_multiaddr(m.external_ip, m.external_port)
                    for m in mapped.mappings()
                    if m.internal_port == control_port(base.host)
                ),
                announced=tuple(announced),
                observers=needs.observers,
            )
            async with (
                open_reachability(
                    base.host,
                    base.identify,
                    around,
                    config.reachability,
                    base.counters,
                    network.changes(),
                ) as reachability,
                trio.open_nursery() as nursery,
            ):
                traversal = Traversal(
                    config, base, needs, network, mapped, reachability
                )
                await nursery.start(traversal.run)
                yield traversal
                nursery.cancel_scope.cancel()
