"""What this machine's network looks like, and what changed: pure.

A view holds the addresses on links that are up and the gateways of the default routes,
with the MAC of each where it is known: a gateway that is swapped for another machine
keeps its IP and changes its MAC. What connections to the world rest on is in here;
everything else (neighbours, other routes) comes and goes without harm.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

import msgspec

from nat.reachability.netwatch_netlink import Address, Link, Message, Neighbour, Route

MAX_ADDRESSES = 1024
"""Interfaces of one machine, containers included."""


class NetworkView(msgspec.Struct, frozen=True):
    """The network at one time.

    Attributes:
        addresses: "ip/prefix" on links that are up, loopback included.
        gateways: Next hops of default routes: IP to MAC, "" while that is unknown.
    """

    addresses: frozenset[str] = frozenset()
    gateways: Mapping[str, str] = {}

    def ips(self) -> frozenset[str]:
        """Return the addresses without prefix."""
        return frozenset(address.partition("/")[0] for address in self.addresses)


class NetworkChanged(msgspec.Struct, frozen=True, kw_only=True):
    """Something that connections rest on is different now.

    Attributes:
        gone_addresses: IPs that we no longer have.
        new_addresses: IPs that we did not have.
        gateway_changed: Whether a default route leads elsewhere.
    """

    gone_addresses: frozenset[str] = frozenset()
    new_addresses: frozenset[str] = frozenset()
    gateway_changed: bool = False


def view_of(messages: Iterable[Message]) -> NetworkView:
    """Return the view that complete dumps of links, addresses, routes, neighbours give.

    A link that the dump does not name counts as up.
    """
    links: dict[int, bool] = {}
    addresses: list[Address] = []
    hops: set[tuple[int, str]] = set()
    macs: dict[tuple[int, str], str] = {}
    for message in messages:
        match message:
            case Link():
                links[message.index] = message.up
            case Address() if not message.tentative and not message.gone:
                addresses.append(message)
            case Route() if message.is_default and not message.gone:
                hops.add((message.link, message.gateway))
            case Neighbour() if not message.gone:
                macs[message.link, message.ip] = message.mac
            case _:
                pass
    up = [each for each in addresses if links.get(each.link, True)]
    gateways = {
        ip: macs.get((link, ip), "")
        for link, ip in sorted(hops)
        if ip and links.get(link, True)
    }
    return NetworkView(
        frozenset(f"{each.ip}/{each.prefix}" for each in up[:MAX_ADDRESSES]), gateways
    )


class NetworkWatch:
    """Remembers the last view and tells what is different from it."""

    def __init__(self) -> None:
        self.view = NetworkView()
        self._macs: dict[str, str] = {}

    def start(self, view: NetworkView) -> None:
        """Take ``view`` as how things are, without news."""
        self.view = view
        self._macs = {ip: mac for ip, mac in view.gateways.items() if mac}

    def update(self, view: NetworkView) -> NetworkChanged | None:
        """Return how ``view`` differs from the last one, or None.

        A temporary IPv6 link-local address is no news: nobody is reached by one.
        """
        before, self.view = self.view, view
        old, new = _lasting(before), _lasting(view)
        changed = NetworkChanged(
            gone_addresses=old - new,
            new_addresses=new - old,
            gateway_changed=self._gateways_changed(before, view),
        )
        return changed if changed != NetworkChanged() else None

    def _gateways_changed(self, before: NetworkView, view: NetworkView) -> bool:
        """Return whether a next hop came, went, or is another machine now.

        A MAC that is not known at the moment is no other machine; the last known one is
        compared when it is known again.
        """
        changed = set(before.gateways) != set(view.gateways)
        for ip, mac in view.gateways.items():
            if mac and self._macs.get(ip, mac) != mac:
                changed = True
        known = {ip: mac for ip, mac in view.gateways.items() if mac}
        kept = {ip: mac for ip, mac in self._macs.items() if ip in view.gateways}
        self._macs = kept | known
        return changed

    def matters(self, messages: Iterable[Message]) -> bool:
        """Return whether any of ``messages`` is a reason to look again."""
        return any(
            message.ip in self.view.gateways
            if isinstance(message, Neighbour)
            else not isinstance(message, Route) or message.is_default
            for message in messages
        )


def _lasting(view: NetworkView) -> frozenset[str]:
    ips = (ipaddress.ip_address(ip) for ip in view.ips())
    return frozenset(
        str(ip) for ip in ips if not (ip.version == 6 and ip.is_link_local)
    )
