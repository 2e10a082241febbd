"""Circuit addresses: ``/ip4/R/tcp/P/p2p/RELAY/p2p-circuit[/p2p/TARGET]``. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId, public_key_of
from nat.multiaddr_bytes import tcp_endpoint

CIRCUIT = "/p2p-circuit"
MAX_ADDRS_PER_RELAY = 4


class CircuitAddress(msgspec.Struct, frozen=True):
    """One parsed circuit address.

    Attributes:
        relay_addr: The relay's own, ending in ``/p2p/RELAY``.
        relay: Its id.
        target: Whom the circuit leads to, if the address says so.
    """

    relay_addr: str
    relay: PeerId
    target: PeerId | None = None


def via(relay: PeerId, target: PeerId) -> str:
    """Return the circuit through a peer that we are connected with, wherever it is."""
    return f"/p2p/{relay}{CIRCUIT}/p2p/{target}"


def parse_circuit_untrusted(addr: str) -> CircuitAddress | None:
    """Return the parts of ``addr``, or None if it is no circuit over one TCP relay."""
    relay_addr, mark, rest = addr.partition(CIRCUIT)
    relay = peer_of(relay_addr)
    if not mark or relay is None or tcp_endpoint(relay_addr) is None:
        return None
    if not rest:
        return CircuitAddress(relay_addr, relay)
    target = peer_of(rest)
    if target is None or rest != f"/p2p/{target}":
        return None
    return CircuitAddress(relay_addr, relay, target)


def peer_of(addr: str) -> PeerId | None:
    """Return the Ed25519 peer id that ``addr`` ends in, if it does."""
    _, mark, name = addr.rpartition("/p2p/")
    if not mark:
        return None
    try:
        public_key_of(name)
    except RemoteProtocolError:
        return None
    return PeerId(name)


def by_relay(addrs: Iterable[str], target: PeerId) -> dict[PeerId, tuple[str, ...]]:
    """Return the relays that circuit addresses of ``target`` name, and their own."""
    found: dict[PeerId, tuple[str, ...]] = {}
    for addr in addrs:
        parsed = parse_circuit_untrusted(addr)
        if parsed is None or parsed.target not in (None, target):
            continue
        known = found.get(parsed.relay, ())
        if parsed.relay_addr not in known and len(known) < MAX_ADDRS_PER_RELAY:
            found[parsed.relay] = (*known, parsed.relay_addr)
    return found


def failure_domain(addrs: Iterable[str]) -> str:
    """Return what relays that may fail together have in common: /24 or /48 of an IP.

    Empty if no address says; relays are then taken to be independent.
    """
    for addr in addrs:
        end = tcp_endpoint(addr)
        if end is not None:
            ip = ipaddress.ip_address(end[0])
            size = 24 if ip.version == 4 else 48
            return str(ipaddress.ip_network((ip, size), strict=False))
    return ""


def announceable(
    relay: PeerId, ip: str, dialled: str, offered: Iterable[str]
) -> tuple[str, ...]:
    """Return the relay's addresses to build circuit addresses from, best first.

    Args:
        relay: Whose.
        ip: Where it is seen to be.
        dialled: The multiaddr that we dialled it at, or empty if it dialled us.
        offered: What is said about it, not all of it true: only addresses at ``ip``, or
            of the other IP version, are believed. So it cannot send the dials of those
            who look for us to somebody else's machine.
    """
    found = {f"{dialled}/p2p/{relay}": None} if dialled else {}
    for addr in offered:
        end = tcp_endpoint(addr)
        if end is None or peer_of(addr) != relay:
            continue
        if end[0] == ip or (":" in end[0]) != (":" in ip):
            found[addr] = None
    return tuple(found)[:MAX_ADDRS_PER_RELAY]
