"""Look at the network from this machine: dial, send one datagram, read the kernel.

Each check is bounded here, does not raise for what it finds, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import trio

from fabric.app.addr_text import short_addr
from nat.addresses import endpoint_of
from nat.doctor.facts import Dialled

DIAL_SECONDS = 3.0
"""A TCP handshake that takes longer is one that people call broken."""
UDP_SECONDS = 1.0
UDP_PORT = 33434
"""Where nobody listens; traceroute uses it, so it is often let through."""
_IP_MTU = {socket.AF_INET: (socket.IPPROTO_IP, 14), socket.AF_INET6: (41, 24)}
"""IP_MTU and IPV6_MTU (linux/in.h, linux/in6.h); Python has no names for them."""
_TABLES = (Path("/proc/net/ip_tables_names"), Path("/proc/net/ip6_tables_names"))


class DialResult(msgspec.Struct, frozen=True):
    """What a TCP dial came to; ``error`` is "" when it was accepted.

    Attributes:
        error: Why not.
        mtu_bytes: Of the route, as the kernel knows it; 0 when it does not.
        mss_bytes: Largest segment on this connection.
    """

    error: str = ""
    mtu_bytes: int = 0
    mss_bytes: int = 0


def endpoint_of_multiaddr(addr: str) -> tuple[str, int] | None:
    """Return IP and port of ``/ip4/../tcp/..``; None for circuits and others."""
    parts = addr.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        return None
    if "p2p-circuit" in parts:
        return None
    bracketed = f"[{parts[2]}]" if parts[1] == "ip6" else parts[2]
    end = endpoint_of(f"{bracketed}:{parts[4]}")
    return None if end is None else (str(end[0]), end[1])


async def dial_tcp(ip: str, port: int) -> DialResult:
    """Return whether ``ip:port`` accepts, and what the kernel knows of the route."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with trio.socket.socket(family, socket.SOCK_STREAM) as sock:
            with trio.move_on_after(DIAL_SECONDS):
                await sock.connect((ip, port))
                mss = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
                return DialResult("", _route_mtu(sock, family), mss)
            return DialResult(f"no answer within {DIAL_SECONDS:.0f} s")
    except OSError as exc:
        return DialResult(os.strerror(exc.errno or 0).lower())


async def dial_multiaddrs(addrs: list[tuple[str, str]]) -> tuple[Dialled, ...]:
    """Return what dialling each (multiaddr, source) came to, in that order."""
    results: dict[str, Dialled] = {}

    async def dial(addr: str, source: str) -> None:
        end = endpoint_of_multiaddr(addr)
        if end is None:
            results[addr] = Dialled(short_addr(addr), "", source, dialled=False)
        else:
            result = await dial_tcp(*end)
            results[addr] = Dialled(short_addr(addr), result.error, source)

    async with trio.open_nursery() as nursery:
        for addr, source in addrs:
            nursery.start_soon(dial, addr, source)
    return tuple(results[addr] for addr, _ in addrs)


def _route_mtu(sock: trio.socket.SocketType, family: socket.AddressFamily | int) -> int:
    if sys.platform != "linux":
        return 0
    level, option = _IP_MTU[socket.AddressFamily(family)]
    return sock.getsockopt(level, option)


def route_mtu(ip: str) -> int:
    """Return the MTU of the route to ``ip``, or 0; nothing is sent."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    if sys.platform != "linux":
        return 0
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((ip, UDP_PORT))
            return sock.getsockopt(*_IP_MTU[family])
    except OSError:
        return 0


async def probe_udp(
    ips: Sequence[str],
) -> Literal["answered", "blocked", "silent"] | None:
    """Return what became of one empty datagram to each of ``ips``; None without any.

    "Port unreachable" is an answer: the datagram went there and the news came back.
    """
    outcomes: list[str] = []
    async with trio.open_nursery() as nursery:
        for ip in ips:
            nursery.start_soon(_probe_one, ip, outcomes, nursery.cancel_scope)
    if not ips:
        return None
    if "answered" in outcomes:
        return "answered"
    return "blocked" if outcomes and set(outcomes) == {"blocked"} else "silent"


async def _probe_one(ip: str, outcomes: list[str], others: trio.CancelScope) -> None:
    outcome = "silent"
    with trio.move_on_after(UDP_SECONDS):
        outcome = await _send_datagram(ip)
    outcomes.append(outcome)
    if outcome == "answered":
        others.cancel()


async def _send_datagram(ip: str) -> str:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
            await sock.connect((ip, UDP_PORT))
            await sock.send(b"")
            await sock.recv(1)
    except ConnectionRefusedError:
        return "answered"
    except OSError as exc:
        return "blocked" if exc.errno in (errno.EPERM, errno.EACCES) else "silent"
    return "answered"


def global_ipv6() -> tuple[str, ...]:
    """Return the global IPv6 address that packets would leave from; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            # 2001:db8::/32 is documentation (RFC 3849): it only chooses a route
            sock.connect(("2001:db8::1", 9))
            own = sock.getsockname()[0]
    except OSError:
        return ()
    return (own,) if ipaddress.ip_address(own).is_global else ()


def has_packet_filter() -> bool | None:
    """Return whether a packet filter is loaded; None when that is not readable."""
    try:
        return any(path.read_text().strip() for path in _TABLES if path.exists())
    except OSError:
        return None
