"""Find the default gateways and our own address towards each.

A port mapping protocol speaks to the next router, so its address must be known. Linux
tells it in ``/proc/net/route`` and ``/proc/net/ipv6_route``; elsewhere nothing is
guessed and the reason is given. Reading is blocking and takes microseconds.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

_IPV4_ROUTES = Path("/proc/net/route")
_IPV6_ROUTES = Path("/proc/net/ipv6_route")
_UP, _GATEWAY = 0x1, 0x2  # RTF_UP, RTF_GATEWAY of linux/route.h
_SOMEWHERE_IPV6 = "2000::1"
"""An address beyond every gateway; nothing is ever sent to it."""


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """A router that takes packets for everywhere.

    Attributes:
        address: Its address, link-local for IPv6.
        interface: Name of our interface towards it.
        source: Our address on that interface; the one it may map ports to.
    """

    address: str
    interface: str
    source: str

    @property
    def is_ipv6(self) -> bool:
        """Whether it is reached by IPv6."""
        return ":" in self.address


class GatewayLookup(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: at most one gateway a family, and why there is none."""

    ipv4: Gateway | None = None
    ipv6: Gateway | None = None
    reason: str = ""


class Route(msgspec.Struct, frozen=True, order=True):
    """A default route; the lowest metric wins."""

    metric: int
    address: str
    interface: str


def default_gateways() -> GatewayLookup:
    """Return the default gateway of each family, with our address towards it."""
    if not sys.platform.startswith("linux"):
        return GatewayLookup(reason=f"no gateway lookup on {sys.platform}")
    ipv4 = _first(parse_ipv4_routes(_read(_IPV4_ROUTES)))
    ipv6 = _first(parse_ipv6_routes(_read(_IPV6_ROUTES)))
    reason = "" if ipv4 else "there is no default IPv4 route through a router"
    return GatewayLookup(ipv4=ipv4, ipv6=ipv6, reason=reason)


def parse_ipv4_routes(text: str) -> list[Route]:
    """Return the default routes of ``/proc/net/route``, best first.

    Addresses there are hexadecimal words in the machine's byte order.
    """
    routes = []
    for fields in _rows(text, 8):
        name, destination, gateway, flags, _, _, metric, mask = fields[:8]
        if int(destination, 16) or int(mask, 16) or not _usable(flags):
            continue
        packed = struct.pack("=I", int(gateway, 16))
        routes.append(Route(int(metric), str(ipaddress.IPv4Address(packed)), name))
    return sorted(routes)


def parse_ipv6_routes(text: str) -> list[Route]:
    """Return the default routes of ``/proc/net/ipv6_route``, best first."""
    routes = []
    for fields in _rows(text, 10):
        destination, prefix, _, _, gateway, metric, _, _, flags, name = fields[:10]
        if int(destination, 16) or int(prefix, 16) or not _usable(flags):
            continue
        address = ipaddress.IPv6Address(bytes.fromhex(gateway))
        routes.append(Route(int(metric, 16), str(address), name))
    return sorted(routes)


def _rows(text: str, columns: int) -> Iterable[list[str]]:
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= columns and fields[0] != "Iface":
            yield fields


def _usable(flags: str) -> bool:
    return int(flags, 16) & (_UP | _GATEWAY) == _UP | _GATEWAY


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a kernel without the family has no such file
        return ""


def _first(routes: list[Route]) -> Gateway | None:
    for route in routes:
        source = _source(route)
        if source:
            return Gateway(
                address=route.address, interface=route.interface, source=source
            )
    return None


def _source(route: Route) -> str:
    """Return the address the kernel would use towards the gateway, or nothing.

    Connecting a UDP socket chooses it without sending a packet. Towards an IPv6 gateway
    the choice would be link-local, so a far address is asked about instead.
    """
    ipv6 = ":" in route.address
    target = _SOMEWHERE_IPV6 if ipv6 else route.address
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((target, 9))
        except OSError:
            return ""
        return str(sock.getsockname()[0])
