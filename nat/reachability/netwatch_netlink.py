"""Linux's routing messages, as far as the network watch reads them: pure.

Source: Linux, include/uapi/linux/{netlink,rtnetlink,if_addr,neighbour,if_link}.h and
rtnetlink(7). Numbers are in the machine's byte order.
"""

from __future__ import annotations

import errno
import ipaddress
import struct
from collections.abc import Iterator

import msgspec

GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""
GETLINK, GETADDR, GETROUTE, GETNEIGH = 18, 22, 26, 30
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR = 16, 17, 20, 21
_NEWROUTE, _DELROUTE, _NEWNEIGH, _DELNEIGH = 24, 25, 28, 29
_ERROR, _DONE = 2, 3
_REQUEST_DUMP = 0x1 | 0x300  # NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH
_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR
_UP_AND_RUNNING = 0x1 | 0x40  # IFF_UP, IFF_RUNNING
_TENTATIVE = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
_HAS_MAC = 0x02 | 0x04 | 0x08 | 0x10 | 0x80  # reachable, stale, delay, probe, permanent
_MAIN_TABLE, _UNICAST = 254, 1
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_MAX_MESSAGES = 4096
"""In one datagram of at most 64 KiB."""


class Link(msgspec.Struct, frozen=True):
    """A link and whether packets pass on it."""

    index: int
    up: bool


class Address(msgspec.Struct, frozen=True):
    """An address of ours on a link."""

    link: int
    ip: str
    prefix: int
    tentative: bool
    gone: bool


class Route(msgspec.Struct, frozen=True):
    """A route; ``gateway`` is "" for a route to the link itself."""

    link: int
    gateway: str
    is_default: bool
    gone: bool


class Neighbour(msgspec.Struct, frozen=True):
    """Who answers for an IP on a link."""

    link: int
    ip: str
    mac: str
    gone: bool


class DumpEnded(msgspec.Struct, frozen=True):
    """The end of a dump; ``error`` is an errno or 0.

    EINTR: what was dumped changed meanwhile, so the dump is not to be trusted.
    """

    error: int = 0


Message = Link | Address | Route | Neighbour | DumpEnded


def dump_request(kind: int, sequence: int) -> bytes:
    """Return the request for all objects of ``kind`` (GETLINK and so on)."""
    body = bytes(4)  # struct rtgenmsg, AF_UNSPEC, padded
    size = _HEADER.size + len(body)
    return _HEADER.pack(size, kind, _REQUEST_DUMP, sequence, 0) + body


def parse_untrusted(data: bytes) -> list[Message]:
    """Return the messages in one datagram; what is malformed or unknown is skipped."""
    found: list[Message] = []
    at = 0
    for _ in range(_MAX_MESSAGES):
        if at + _HEADER.size > len(data):
            break
        size, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= size <= len(data) - at:
            break
        message = _parse(kind, data[at + _HEADER.size : at + size])
        if message is not None:
            found.append(message)
        if flags & _INTERRUPTED:
            found.append(DumpEnded(errno.EINTR))
        at += _aligned(size)
    return found


def _parse(kind: int, body: bytes) -> Message | None:
    try:
        if kind in (_NEWADDR, _DELADDR):
            return _address(body, gone=kind == _DELADDR)
        if kind in (_NEWROUTE, _DELROUTE):
            return _route(body, gone=kind == _DELROUTE)
        if kind in (_NEWNEIGH, _DELNEIGH):
            return _neighbour(body, gone=kind == _DELNEIGH)
        if kind in (_NEWLINK, _DELLINK):
            return _link(body, gone=kind == _DELLINK)
        if kind in (_ERROR, _DONE):
            return DumpEnded(-struct.unpack_from("=i", body)[0])
    except (struct.error, ValueError):
        return None
    return None


def _address(body: bytes, *, gone: bool) -> Address | None:
    _, prefix, flags, _, link = struct.unpack_from("=BBBBI", body)
    attributes = dict(_attributes(body, 8))
    # on a point-to-point link IFA_ADDRESS is the other end and IFA_LOCAL is ours
    raw = attributes.get(2, attributes.get(1))
    if raw is None:
        return None
    return Address(link, _ip(raw), prefix, bool(flags & _TENTATIVE), gone)


def _route(body: bytes, *, gone: bool) -> Route:
    _, bits, _, _, table, _, _, kind = struct.unpack_from("=8B", body)
    attributes = dict(_attributes(body, 12))
    link = struct.unpack("=I", attributes[4])[0] if 4 in attributes else 0
    gateway = _ip(attributes[5]) if 5 in attributes else ""
    default = bits == 0 and table == _MAIN_TABLE and kind == _UNICAST
    return Route(link, gateway, default, gone)


def _neighbour(body: bytes, *, gone: bool) -> Neighbour | None:
    _, _, _, link, state = struct.unpack_from("=BBHiH", body)
    attributes = dict(_attributes(body, 12))
    if 1 not in attributes:
        return None
    mac = attributes.get(2, b"") if state & _HAS_MAC else b""
    return Neighbour(link, _ip(attributes[1]), mac.hex(":"), gone)


def _link(body: bytes, *, gone: bool) -> Link:
    _, _, _, index, flags = struct.unpack_from("=BBHiI", body)
    return Link(index, not gone and flags & _UP_AND_RUNNING == _UP_AND_RUNNING)


def _attributes(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + _ATTRIBUTE.size <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        if not _ATTRIBUTE.size <= size <= len(body) - at:
            return
        yield kind & 0x3FFF, body[at + _ATTRIBUTE.size : at + size]
        at += _aligned(size)


def _ip(raw: bytes) -> str:
    """Return the IP in 4 or 16 bytes.

    Raises:
        ValueError: another number of bytes.
    """
    if len(raw) not in (4, 16):
        raise ValueError("not an IP address")
    return str(ipaddress.ip_address(raw))


def _aligned(size: int) -> int:
    return (size + 3) & ~3
