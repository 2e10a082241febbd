"""Turn a topology into commands of iproute2 and nftables: pure, so that it can be read.

One namespace, ``switch``, holds every bridge: ``pub`` is the public network, ``lanN``
that of site N. Namespaces of gateways and hosts hang on it, so a gateway can be
replaced while its hosts keep their link.

IPv6 is routed by the switch, without translation: 2001:db8::N:10 is site N's end of the
public network, 2001:db8:N::/64 what its gateway routes to its hosts.

    host eth0 -- hN-k [lanN] glN -- lan GATEWAY ext -- upN [pub] upM -- eth0 public host
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sims.lab.nat_rules import rules_of
from sims.lab.topology import (
    PUBLIC_BITS,
    Behaviour,
    Filtering,
    Mapping,
    NatKind,
    Shape,
    Site,
)

SWITCH = "switch"
HOME = Behaviour(mapping=Mapping.INDEPENDENT, filtering=Filtering.ADDRESS_AND_PORT)
"""The inner gateway of a carrier's customer."""
TBF_LATENCY_MS = 50
"""What a shaped link queues: a home router holds about this much."""
MIN_BURST_BYTES = 16 << 10
BURST_SECONDS = 0.005


class Step(msgspec.Struct, frozen=True):
    """One command and what it reads."""

    argv: tuple[str, ...]
    stdin: str = ""


def public_address(number: int, uplink: int = 0) -> str:
    """Return the public address of site ``number`` after ``uplink`` changes."""
    return f"80.80.{number}.{10 + uplink}"


def lan_of(site: Site, number: int) -> str:
    """Return the first three octets of the site's private network."""
    return f"192.168.{site.lan or number}"


def host_address(site: Site, number: int, index: int, uplink: int = 0) -> str:
    """Return the address of the site's host ``index``."""
    if site.kind is NatKind.NONE:
        return public_address(number, uplink)
    return f"{lan_of(site, number)}.{10 + index}"


def public_address6(net6: str, number: int) -> str:
    """Return the IPv6 address of site ``number`` on the public network."""
    return f"{net6}::{number}:10"


def host_address6(net6: str, site: Site, number: int, index: int) -> str:
    """Return the IPv6 address of the site's host ``index``."""
    if site.kind is NatKind.NONE:
        return public_address6(net6, number)
    return f"{net6}:{number}::{10 + index}"


def edge_of(site: Site) -> tuple[str, str]:
    """Return (role, device) of what holds the site's public address."""
    if site.kind is NatKind.NONE:
        return site.name, "eth0"
    if site.kind is NatKind.CGNAT:
        return f"carrier-{site.name}", "ext"
    return f"gateway-{site.name}", "ext"


def gateways_of(site: Site) -> tuple[str, ...]:
    """Return the roles of the site's gateways, outermost last."""
    home = f"gateway-{site.name}"
    layers = (home, f"carrier-{site.name}")
    return layers[: site.kind.behaviour.layers]


class Script:
    """Collects commands; :meth:`steps` puts them into an order that works.

    Args:
        prefix: Of the namespaces' names.
        net6: First two groups of every IPv6 address.
    """

    def __init__(self, prefix: str, net6: str = "2001:db8") -> None:
        self.net6 = net6
        self._prefix = prefix
        self._has_ip6: set[str] = set()
        self._root: list[str] = []
        self._links: list[str] = []
        self._inside: dict[str, list[str]] = {}
        self._shapes: dict[str, list[str]] = {}
        self._rules: dict[str, str] = {}
        self._born: dict[str, bool] = {}

    def namespace(
        self, role: str, *, forwards: bool = False, rules: str = "", ip6: bool = False
    ) -> None:
        """Create a namespace; a gateway forwards by ``rules``."""
        if ip6:
            self._has_ip6.add(role)
        self._root.append(f"netns add {self._prefix}{role}")
        self._born[role] = forwards
        self.inside(role, "link set lo up")
        if rules:
            self._rules[role] = rules

    def link(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        """Join two (role, device) by a pair of virtual Ethernet devices."""
        (a, device_a), (b, device_b) = one, other
        self._links.append(
            f"link add {device_a} netns {self._prefix}{a} type veth"
            f" peer name {device_b} netns {self._prefix}{b}"
        )

    def inside(self, role: str, *lines: str) -> None:
        """Run lines of ``ip`` in a namespace."""
        self._inside.setdefault(role, []).extend(lines)

    def shape(self, role: str, device: str, shape: Shape) -> None:
        """Limit what ``device`` sends."""
        if shape.rate_mbit:
            bytes_per_second = shape.rate_mbit * 1e6 / 8
            burst = max(MIN_BURST_BYTES, int(bytes_per_second * BURST_SECONDS))
            self._shapes.setdefault(role, []).append(
                f"qdisc add dev {device} root tbf rate {shape.rate_mbit:g}mbit"
                f" burst {burst} latency {TBF_LATENCY_MS}ms"
            )

    def steps(self) -> list[Step]:
        """Return the commands: namespaces, links, what is inside, rules."""
        found = [_batch(("ip",), [*self._root, *self._links])]
        for role in sorted(self._inside, key=lambda role: role != SWITCH):
            name = self._prefix + role
            if role in self._born:
                found.append(self._sysctl(role))
            found.append(_batch(("ip", "-n", name), self._inside[role]))
            if role in self._shapes:
                found.append(_batch(("tc", "-n", name), self._shapes[role]))
            if role in self._rules:
                nft = ("ip", "netns", "exec", name, "nft", "-f", "-")
                found.append(Step(nft, self._rules[role]))
        return [step for step in found if step.stdin or "exec" in step.argv]

    def _sysctl(self, role: str) -> Step:
        # where there is no IPv6, link-local addresses would only be in the way
        off, forwards = int(role not in self._has_ip6), int(self._born[role])
        settings = [f"net.ipv6.conf.all.disable_ipv6={off}"]
        settings += [f"net.ipv6.conf.default.disable_ipv6={off}"]
        settings += [f"net.ipv6.conf.all.forwarding={forwards and not off:d}"]
        settings += [f"net.ipv4.ip_forward={forwards}"]
        enter = ("ip", "netns", "exec", self._prefix + role)
        return Step((*enter, "sysctl", "-qw", *settings))


def _batch(argv: tuple[str, ...], lines: Sequence[str]) -> Step:
    return Step((*argv, "-batch", "-"), "\n".join(lines) + "\n" if lines else "")


def build_switch(script: Script, *, ip6: bool = False) -> None:
    """Create the public network."""
    script.namespace(SWITCH, forwards=ip6, ip6=ip6)
    script.inside(SWITCH, "link add pub type bridge", "link set pub up")
    if ip6:
        script.inside(SWITCH, f"addr add {script.net6}::1/64 dev pub nodad")


def build_site(script: Script, site: Site, number: int) -> None:
    """Create a site: its hosts, its gateway, its uplink."""
    if site.kind is not NatKind.NONE:
        lan = f"lan{number}"
        script.inside(SWITCH, f"link add {lan} type bridge", f"link set {lan} up")
    for index, host in enumerate(site.host_names):
        script.namespace(host, ip6=site.ip.has_ip6)
        if site.kind is not NatKind.NONE:
            port = f"h{number}-{index}"
            script.link((SWITCH, port), (host, "eth0"))
            script.inside(SWITCH, f"link set {port} master lan{number} up")
            settle_host(script, host, site, number, index)
    build_edge(script, site, number)


def settle_host(script: Script, host: str, site: Site, number: int, index: int) -> None:
    """Give a host behind a gateway its address and route."""
    script.inside(
        host,
        f"addr add {host_address(site, number, index)}/24 dev eth0",
        "link set eth0 up",
        f"route add default via {lan_of(site, number)}.1",
    )
    if site.ip.has_ip6:
        own = host_address6(script.net6, site, number, index)
        script.inside(
            host,
            f"addr add {own}/64 dev eth0 nodad",
            f"route add default via {script.net6}:{number}::1",
        )


def build_edge(script: Script, site: Site, number: int, uplink: int = 0) -> None:
    """Create a site's gateways and its uplink, with the address of that uplink."""
    behaviour = site.kind.behaviour
    gateways = gateways_of(site)
    for role in gateways:
        outermost = role == gateways[-1]
        rules = rules_of(behaviour if outermost else HOME)
        script.namespace(role, forwards=True, rules=rules, ip6=site.ip.has_ip6)
    if gateways:
        home = gateways[0]
        script.link((SWITCH, f"gl{number}"), (home, "lan"))
        script.inside(SWITCH, f"link set gl{number} master lan{number} up")
        script.inside(
            home,
            # the same for every gateway of the site: hosts keep their ARP entry
            f"link set lan address 02:00:00:00:{number:02x}:01",
            f"addr add {lan_of(site, number)}.1/24 dev lan",
            "link set lan up",
        )
        if site.ip.has_ip6:
            lan = f"{script.net6}:{number}::"
            script.inside(home, f"addr add {lan}1/64 dev lan nodad")
            via = public_address6(script.net6, number)
            script.inside(SWITCH, f"route add {lan}/64 via {via} dev pub")
    if len(gateways) > 1:
        _build_carrier(script, gateways[0], gateways[1], number)
    _build_uplink(script, site, number, uplink)


def _build_carrier(script: Script, home: str, carrier: str, number: int) -> None:
    script.link((home, "ext"), (carrier, "lan"))
    # RFC 6598: the shared address space between a carrier and its customers
    script.inside(
        home,
        f"addr add 100.64.{number}.2/24 dev ext",
        "link set ext up",
        f"route add default via 100.64.{number}.1",
    )
    script.inside(carrier, f"addr add 100.64.{number}.1/24 dev lan", "link set lan up")


def _build_uplink(script: Script, site: Site, number: int, uplink: int) -> None:
    role, device = edge_of(site)
    port = f"up{number}"
    if site.shape.is_carried:
        # a process of ours carries frames between these two (delay_link.py)
        script.inside(role, f"tuntap add dev {device} mode tap vnet_hdr")
        script.inside(SWITCH, f"tuntap add dev {port} mode tap vnet_hdr")
    else:
        script.link((SWITCH, port), (role, device))
    script.inside(SWITCH, f"link set {port} master pub up")
    script.inside(role, f"link set {device} up")
    if site.ip.has_ip4:
        own = f"{public_address(number, uplink)}/{PUBLIC_BITS}"
        script.inside(role, f"addr add {own} dev {device}")
    if site.ip.has_ip6:
        own = f"{public_address6(script.net6, number)}/64"
        script.inside(
            role,
            f"addr add {own} dev {device} nodad",
            f"route add default via {script.net6}::1",
        )
    script.shape(role, device, site.shape)
    script.shape(SWITCH, port, site.shape)
