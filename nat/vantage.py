"""Where we stand: our addresses, our NAT, and which of a peer's addresses to dial."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fabric.core.ids import PeerId
from fabric.net.data_plane import DataPlane
from fabric.net.offers import format_address
from fabric.net.traversal_api import TraversalHost
from nat.addresses import (
    AddressClass,
    classify,
    endpoint_of,
    public_ips,
    rank_addresses,
    worth_dialling,
)
from nat.multiaddr_bytes import tcp_multiaddr
from nat.portmap.service import PortMapping
from nat.punch.facts import Mapping, NatFacts
from nat.reachability.core import filtering_of
from nat.reachability.netwatch_service import NetworkWatcher
from nat.reachability.service import ReachabilityService
from nat.relay.circuit_addresses import CIRCUIT

MAX_DATA_ADDRESSES = 8
MAX_NEIGHBOURS = 6
"""Members that are asked for one circuit; others the next time."""
_PUNCH_WORDS: dict[str, Mapping] = {
    "none": "endpoint_independent",
    "endpoint_independent": "endpoint_independent",
    "address_or_port_dependent": "address_dependent",
}


class Vantage:
    """Answers from memory, anew each time.

    Args:
        host: Our control plane.
        plane: Our data plane.
        network: The interfaces.
        mapping: What routers forward to us.
        reachability: What others say of us.
        addresses_of: Multiaddrs at which a peer may be.
        admits: Whether we trust a peer, and may ask it to carry something.
        rng: Chooses among the members that may.
    """

    def __init__(
        self,
        host: TraversalHost,
        plane: DataPlane,
        network: NetworkWatcher,
        mapping: PortMapping,
        reachability: ReachabilityService,
        addresses_of: Callable[[PeerId], Sequence[str]],
        admits: Callable[[PeerId], bool],
        rng: random.Random | None = None,
    ) -> None:
        self._admits = admits
        self._rng = rng or random.Random()
        self._host = host
        self._plane = plane
        self._network = network
        self._mapping = mapping
        self._reachability = reachability
        self._addresses_of = addresses_of

    def rank(self, peer: PeerId, addresses: Sequence[str]) -> tuple[str, ...]:
        """Return those of ``peer``'s addresses worth a dial, best first.

        Multiaddrs and "ip:port" alike; circuits stay, behind the others.
        """
        plain = [address for address in addresses if CIRCUIT not in address]
        seen = [
            info.remote for info in self._host.connections(peer) if info.kind != "relay"
        ]
        known = (*self._addresses_of(peer), *seen)
        ranked = rank_addresses(
            plain,
            sorted(self._network.view().addresses),
            self.public_ips(),
            public_ips(address for address in known if CIRCUIT not in address),
        )
        circuits = [address for address in addresses if CIRCUIT in address]
        return (*worth_dialling(ranked), *circuits)

    def neighbours(self, peer: PeerId) -> tuple[PeerId, ...]:
        """Return members that we reach without a relay: they may reach ``peer``."""
        found = [
            other
            for other in sorted(self._host.connected())
            if other != peer
            and any(info.kind != "relay" for info in self._host.connections(other))
            and self._admits(other)
        ]
        return tuple(self._rng.sample(found, min(len(found), MAX_NEIGHBOURS)))

    def local_ips(self) -> tuple[str, ...]:
        """Return the addresses of our interfaces."""
        return tuple(sorted(self._network.view().ips()))

    def public_ips(self) -> frozenset[str]:
        """Return where others see us come from."""
        mapped = [m.external_ip for m in self._mapping.mappings()]
        return frozenset((*self._reachability.mapping().external_ips, *mapped))

    def facts(self) -> NatFacts:
        """Return what is known of our NAT, for punching."""
        mapping = self._reachability.mapping()
        return NatFacts(
            mapping=_PUNCH_WORDS.get(mapping.kind, "unknown"),
            filtering=filtering_of(self._reachability.verdict()),
            public=self._is_public(),
            port_step=mapping.port_step,
        )

    def data_addresses(self) -> tuple[str, ...]:
        """Return "ip:port" at which the world reaches our data plane, if it does."""
        mapped = self.mapped_to(self._plane.port)
        own = self._plane.addresses() if self._is_public() else ()
        reached = (
            address
            for address in own
            if (end := endpoint_of(address)) is not None
            and classify(end[0]) is AddressClass.PUBLIC
        )
        return tuple(dict.fromkeys((*mapped, *reached)))[:MAX_DATA_ADDRESSES]

    def _is_public(self) -> bool:
        return self._reachability.verdict().open_to_the_internet

    def mapped_to(self, port: int) -> tuple[str, ...]:
        """Return "ip:port" of routers that lead to our ``port``."""
        return tuple(
            format_address(m.external_ip, m.external_port)
            for m in self._mapping.mappings()
            if m.internal_port == port
        )

    def control_port(self) -> int:
        """Return the TCP port that control connections leave from, or 0."""
        return control_port(self._host)

    def observed(self) -> tuple[str, ...]:
        """Return the multiaddr at which others see that port, if they agree."""
        external = self._reachability.mapping().external
        end = endpoint_of(external) if external is not None else None
        return (tcp_multiaddr(str(end[0]), end[1]),) if end is not None else ()

    def is_settled(self) -> bool:
        """Return whether others have said how they see that port, agreeing or not."""
        mapping = self._reachability.mapping()
        return mapping.external is not None or mapping.kind != "unknown"


def control_port(host: TraversalHost) -> int:
    """Return the TCP port that ``host`` listens on, or 0."""
    ends = [end for end in map(endpoint_of, host.listen_addrs()) if end is not None]
    return ends[0][1] if ends else 0
