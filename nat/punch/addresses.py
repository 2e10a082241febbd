"""Which addresses of a peer's CONNECT are dialled: pure, the peer may lie.

A CONNECT makes us send SYNs to whatever it names. So: public unicast addresses, few; a
private one only if the peer is at our site; a loopback one only if we are only there
ourselves; no port below 1024 but 80 and 443. The rest is refused before any packet
leaves.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fabric.core.errors import RemoteProtocolError
from fabric.net.offers import parse_address_untrusted
from nat.punch.facts import UNKNOWN, Address, NatFacts, predict_ports

MAX_TARGETS = 8
"""Addresses dialled on account of one CONNECT."""
MAX_PUBLIC_IPS = 2
"""Different public addresses of one family among them: two uplinks."""
ALLOWED_LOW_PORTS = frozenset({80, 443})
"""What an operator's listener may use where little else passes outwards."""

AddressClass = Literal["public", "private", "loopback", "forbidden"]
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# RFC 1918, RFC 6598 (carrier-grade NAT), RFC 4193
_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "fc00::/7",
    )
)
# "this network", limited broadcast and class E; tunnels that hide an IPv4 address
_FORBIDDEN = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "240.0.0.0/4",
        "::ffff:0:0/96",
        "::/96",
        "64:ff9b::/96",
        "2001::/32",
        "2002::/16",
        "fec0::/10",
    )
)


def classify_ip(ip: str) -> AddressClass:
    """Return what kind of address ``ip`` is; documentation ranges count as public."""
    address = ipaddress.ip_address(ip)
    if address.is_loopback:
        return "loopback"
    if address.is_multicast or address.is_link_local or address.is_unspecified:
        return "forbidden"
    if _within(address, _FORBIDDEN):
        return "forbidden"
    return "private" if _within(address, _PRIVATE) else "public"


@dataclass(frozen=True)
class OwnSide:
    """Our end of a punch.

    Attributes:
        observed: The port as observers saw it, in their order.
        local: Our interfaces' addresses with the same port.
        facts: What our NAT does.
    """

    observed: tuple[Address, ...] = ()
    local: tuple[Address, ...] = ()
    facts: NatFacts = UNKNOWN

    def offered(self) -> tuple[Address, ...]:
        """Return what our CONNECT names, best first.

        A symmetric NAT's last mapping is of no use by itself, but its IP opens the
        filter of a NAT that looks at addresses only.
        """
        found = list(self.observed)
        if self.facts.port_step and len(self.observed) > 1:
            ip, port = self.observed[-1]
            ports = predict_ports(port, self.facts.port_step)
            found = [(ip, port) for port in ports]
        found += [a for a in self.local if classify_ip(a[0]) != "forbidden"]
        if any(classify_ip(ip) != "loopback" for ip, _ in found):
            found = [a for a in found if classify_ip(a[0]) != "loopback"]
        return tuple(dict.fromkeys(found))[:MAX_TARGETS]


def is_same_site(own: OwnSide, theirs: Iterable[Address]) -> bool:
    """Return whether the peer claims the public address that observers see us at.

    The claim is not proven: it gains a liar SYNs to unprivileged ports of our own site
    at the rate limit of punches, and no answer.
    """
    public = {ip for ip, _ in own.observed if classify_ip(ip) == "public"}
    if public:
        return any(ip in public for ip, _ in theirs)
    # whoever sees us is near: a mesh inside one site, or on one machine
    ours = {classify_ip(ip) for ip, _ in own.observed}
    return any(classify_ip(ip) in ours - {"public"} for ip, _ in theirs)


def parse_addresses_untrusted(texts: Sequence[str]) -> tuple[Address, ...]:
    """Return the "ip:port" that are well-formed, each once; a name is not looked up."""
    found = []
    for text in texts:
        try:
            found.append(parse_address_untrusted(text))
        except RemoteProtocolError:
            continue
    return tuple(dict.fromkeys(found))


def select_targets(
    own: OwnSide, theirs: Sequence[Address]
) -> tuple[tuple[Address, ...], dict[Address, str]]:
    """Return what to dial, nearest first, and why the rest is not dialled.

    Args:
        own: Our end; nothing of it is dialled.
        theirs: What the peer's CONNECT names.
    """
    # being on one machine says nothing about networks: it opens loopback alone
    seen_beyond = any(classify_ip(ip) != "loopback" for ip, _ in own.observed)
    same_site = seen_beyond and is_same_site(own, theirs)
    loopback_only = _is_loopback_only(own)
    targets: list[Address] = []
    refused: dict[Address, str] = {}
    public: dict[int, set[str]] = {4: set(), 6: set()}
    for address in dict.fromkeys(theirs):
        kind = classify_ip(address[0])
        why = _why_not(own, address, kind, same_site, loopback_only)
        if not why and kind == "public":
            family = public[ipaddress.ip_address(address[0]).version]
            if address[0] not in family and len(family) == MAX_PUBLIC_IPS:
                why = f"more than {MAX_PUBLIC_IPS} public addresses"
            else:
                family.add(address[0])
        if not why and len(targets) == MAX_TARGETS:
            why = f"more than {MAX_TARGETS} addresses"
        if why:
            refused[address] = why
        else:
            targets.append(address)
    # behind one NAT the private address is the short way: routers rarely hairpin
    targets.sort(key=lambda address: classify_ip(address[0]) == "public")
    return tuple(targets), refused


def _why_not(
    own: OwnSide,
    address: Address,
    kind: AddressClass,
    same_site: bool,
    loopback_only: bool,
) -> str:
    _, port = address
    if kind == "forbidden":
        return "not a unicast address beyond the link"
    if port < 1024 and port not in ALLOWED_LOW_PORTS:
        return "port of a well-known service"
    if kind == "loopback" and not loopback_only:
        return "loopback of another machine"
    if kind == "private" and not same_site:
        return "private address of another site"
    if address in own.observed or address in own.local:
        return "our own address"
    return ""


def _is_loopback_only(own: OwnSide) -> bool:
    ips = [ip for ip, _ in (*own.observed, *own.local)]
    return bool(ips) and all(classify_ip(ip) == "loopback" for ip in ips)


def _within(
    address: _IP, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]
) -> bool:
    return any(
        address.version == network.version and address in network
        for network in networks
    )
