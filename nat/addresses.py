"""Which addresses of a peer are worth a dial from here, and why.

A private address names a machine only inside its own site: 192.168.1.2 of a peer in
another town is a stranger's printer here. So private addresses are dialled first when
both peers are seen to share a site, last when that is not known, and not at all when
their public addresses differ and no interface of ours leads there.

Documentation and benchmarking ranges (RFC 5737, RFC 2544) count as public: nothing is
lost by a dial there, and laboratories use them as a stand-in for the internet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum

import msgspec

MAX_CANDIDATES = 64
"""Addresses of one peer that are looked at; a machine has a few."""

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class AddressClass(StrEnum):
    """How far an address reaches."""

    LOOPBACK = "loopback"
    LINK_LOCAL = "link_local"
    PRIVATE = "private"
    CGNAT = "cgnat"
    PUBLIC = "public"
    MULTICAST = "multicast"
    UNUSABLE = "unusable"


_CLASSES = [
    (AddressClass.LOOPBACK, ("127.0.0.0/8", "::1/128")),
    (AddressClass.LINK_LOCAL, ("169.254.0.0/16", "fe80::/10")),  # RFC 3927, 4291
    (AddressClass.PRIVATE, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")),
    (AddressClass.PRIVATE, ("fc00::/7",)),  # RFC 1918, 4193
    (AddressClass.CGNAT, ("100.64.0.0/10",)),  # RFC 6598
    (AddressClass.MULTICAST, ("224.0.0.0/4", "ff00::/8")),
    (AddressClass.UNUSABLE, ("0.0.0.0/8", "240.0.0.0/4", "::/128", "100::/64")),
]
_NETWORKS = [
    (kind, ipaddress.ip_network(network))
    for kind, networks in _CLASSES
    for network in networks
]
_SITE_ONLY = frozenset({AddressClass.PRIVATE, AddressClass.CGNAT})


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate with its verdict.

    Attributes:
        address: As it was given.
        order: Smaller is better; below zero is not worth a dial.
        reason: Why, for `fabric why`.
    """

    address: str
    order: int
    reason: str

    @property
    def worth_a_dial(self) -> bool:
        """Whether to dial it at all."""
        return self.order >= 0


def parse_ip(text: str) -> Ip | None:
    """Return the address in ``text``; an IPv4 one mapped into IPv6 is unwrapped."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(ip, "ipv4_mapped", None)
    return mapped if mapped is not None else ip


def classify(ip: str | Ip) -> AddressClass:
    """Return how far ``ip`` reaches; what is no IP address is unusable."""
    parsed = parse_ip(str(ip))
    if parsed is None:
        return AddressClass.UNUSABLE
    for kind, network in _NETWORKS:
        if parsed.version == network.version and parsed in network:
            return kind
    return AddressClass.PUBLIC


def endpoint_of(address: str) -> tuple[Ip, int] | None:
    """Return IP and port of "ip:port", "[ip]:port" or "/ip4/../tcp/..".

    None for circuits, names, other transports and nonsense.
    """
    if address.startswith("/"):
        parts = address.split("/")
        fits = len(parts) >= 5 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp"
        if not fits or "p2p-circuit" in parts:
            return None
        host, port = parts[2], parts[4]
    else:
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
    ip = parse_ip(host)
    if ip is None or not (port.isascii() and port.isdecimal() and len(port) <= 5):
        return None
    return (ip, int(port)) if 0 < int(port) < 1 << 16 else None


def public_ips(addresses: Iterable[str]) -> frozenset[str]:
    """Return the public IPs among ``addresses``."""
    found = (endpoint_of(address) for address in addresses)
    return frozenset(
        str(end[0]) for end in found if end is not None and _is_public(end[0])
    )


def _is_public(ip: str | Ip) -> bool:
    return classify(ip) is AddressClass.PUBLIC


def same_site(own: Collection[str], peers: Collection[str]) -> bool | None:
    """Return whether both have a public IP in common; None when one has none known."""
    if not own or not peers:
        return None
    return not set(own).isdisjoint(peers)


def rank_addresses(
    candidates: Sequence[str],
    own_interfaces: Sequence[str],
    own_public_ips: Collection[str],
    peer_public_ips: Collection[str],
) -> tuple[Ranked, ...]:
    """Return every candidate with its verdict, best first.

    Args:
        candidates: The peer's addresses, in its order of preference, which is kept
            among equals. The first MAX_CANDIDATES count.
        own_interfaces: Our addresses with prefix lengths ("192.168.1.7/24").
        own_public_ips: Where others see us come from; private ones, which neighbours
            see, tell nothing about sites and are left out.
        peer_public_ips: Where the peer is seen to come from; its public candidates
            are added, private ones left out.
    """
    chosen = list(dict.fromkeys(candidates))[:MAX_CANDIDATES]
    site = _Site(chosen, own_interfaces, own_public_ips, peer_public_ips)
    verdicts = [site.judge(address) for address in chosen]
    return tuple(sorted(verdicts, key=lambda ranked: ranked.order % _LAST))


def worth_dialling(ranked: Iterable[Ranked]) -> tuple[str, ...]:
    """Return the addresses that are worth a dial, in order."""
    return tuple(each.address for each in ranked if each.worth_a_dial)


_LAST = 1 << 16


class _Site:
    """What is known about both sides."""

    def __init__(
        self,
        candidates: Sequence[str],
        own_interfaces: Sequence[str],
        own_public_ips: Collection[str],
        peer_public_ips: Collection[str],
    ) -> None:
        self._own = [ipaddress.ip_interface(text) for text in own_interfaces]
        self._own_ips = {interface.ip for interface in self._own}
        own = {*own_public_ips, *map(str, self._own_ips)}
        self._own_public = {ip for ip in own if _is_public(ip)}
        peers = {ip for ip in peer_public_ips if _is_public(ip)}
        peers |= public_ips(candidates)
        self._same = same_site(self._own_public, peers)
        ends = [end[0] for end in map(endpoint_of, candidates) if end is not None]
        self._same_host = any(
            ip in self._own_ips and not ip.is_loopback for ip in ends
        ) or all(ip.is_loopback for ip in ends)

    def judge(self, address: str) -> Ranked:
        end = endpoint_of(address)
        if end is None:
            return Ranked(address=address, order=-1, reason="not an IP and TCP port")
        order, reason = self._verdict(end[0])
        return Ranked(address=address, order=order, reason=reason)

    def _verdict(self, ip: Ip) -> tuple[int, str]:
        kind = classify(ip)
        if kind is AddressClass.LOOPBACK:
            return (0, "same host") if self._same_host else (-1, "another host's own")
        if kind in (AddressClass.MULTICAST, AddressClass.UNUSABLE):
            return -1, f"a {kind} address is nobody's"
        if self._own and not any(i.version == ip.version for i in self._routable()):
            return -1, f"no IPv{ip.version} here"
        if kind is AddressClass.LINK_LOCAL:
            return self._link_local(ip)
        if kind in _SITE_ONLY:
            return self._private(ip)
        if str(ip) in self._own_public and ip not in self._own_ips:
            return 5, "our own router's address: it must send back what we send"
        return 2, "public"

    def _routable(self) -> list[Interface]:
        no_route = (AddressClass.LOOPBACK, AddressClass.LINK_LOCAL)
        return [each for each in self._own if classify(each.ip) not in no_route]

    def _on_link(self, ip: Ip) -> bool:
        return any(ip in interface.network for interface in self._own)

    def _link_local(self, ip: Ip) -> tuple[int, str]:
        if ip.version == 6:
            return -1, "a link-local IPv6 address needs the name of a link"
        if self._on_link(ip):
            return 6, "on a link of ours that has no address server"
        return -1, "on another link"

    def _private(self, ip: Ip) -> tuple[int, str]:
        on_link = self._on_link(ip)
        if self._same is False:
            if on_link:
                return 7, "another site's, unless a network of ours spans both"
            return -1, "private address of another site"
        if on_link:
            return 1, "on a network of ours"
        if self._same:
            return 3, "at our site, behind a router of it"
        return 7, "private, and whether it is our site is not known"
