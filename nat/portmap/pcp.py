"""Port Control Protocol: MAP and ANNOUNCE as a client needs them.

Every packet begins with a 24-byte header; MAP adds 36 bytes (RFC 6887 sections 7 and
11.1). An answer is matched by version, opcode, nonce, protocol and internal port: the
nonce is what keeps a neighbour who can forge the gateway's address, but not read our
packets, from answering for it.

Source: RFC 6887, "Port Control Protocol (PCP)".
"""

from __future__ import annotations

import ipaddress
import struct
from enum import IntEnum

import msgspec

from fabric.core.errors import RemoteProtocolError

VERSION = 2
SERVER_PORT = 5351
CLIENT_PORT = 5350
"""Where restarts are announced to, at 224.0.0.1 (RFC 6887 section 14.1)."""
MAX_BYTES = 1100
"""Longest packet of the protocol (RFC 6887 section 7)."""
NONCE_BYTES = 12

_ANNOUNCE, _MAP = 0, 1
_RESPONSE = 0x80
_TCP = 6
_REQUEST = struct.Struct("!BBHI16s")
_ANSWER = struct.Struct("!BBxBII12x")
_MAP_BODY = struct.Struct("!12sB3xHH16s")


class Result(IntEnum):
    """Result codes (RFC 6887 section 7.4)."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


class MapRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for, renew or (lifetime 0) delete a TCP mapping.

    Attributes:
        client: Our address on the network of the server; it refuses another one.
        nonce: Twelve random bytes, the same for the life of the mapping.
        internal_port: Port we listen on.
        external_port: Port we would like, or 0.
        external_ip: Address we would like (the one we had), or "" for any.
        lifetime: Seconds; 0 deletes.
    """

    client: str
    nonce: bytes
    internal_port: int
    external_port: int
    external_ip: str
    lifetime: int


class MapAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the server answered to a MAP; on failure lifetime is when to ask again."""

    result: int
    lifetime: int
    epoch: int
    nonce: bytes
    internal_port: int
    external_port: int
    external_ip: str


class Announcement(msgspec.Struct, frozen=True, kw_only=True):
    """The server's epoch, told to everyone after a restart."""

    epoch: int


class VersionRefused(msgspec.Struct, frozen=True):
    """The server speaks another version: NAT-PMP is 0 (RFC 6887 section 9)."""

    version: int


Answer = MapAnswer | Announcement | VersionRefused


def encode_map(request: MapRequest) -> bytes:
    """Return the packet of ``request``."""
    wanted = request.external_ip or _any_like(request.client)
    return _REQUEST.pack(
        VERSION, _MAP, 0, request.lifetime, pack_address(request.client)
    ) + _MAP_BODY.pack(
        request.nonce,
        _TCP,
        request.internal_port,
        request.external_port,
        pack_address(wanted),
    )


def decode_untrusted(data: bytes) -> Answer:
    """Return what a packet from the gateway's PCP port says.

    Raises:
        RemoteProtocolError: too long, truncated, not an answer, or not about TCP.
    """
    if not 4 <= len(data) <= MAX_BYTES or not data[1] & _RESPONSE:
        raise RemoteProtocolError(f"not a PCP answer: {len(data)} B")
    if data[0] != VERSION:  # NAT-PMP servers answer with a header of their own
        return VersionRefused(data[0])
    if len(data) < _ANSWER.size:
        raise RemoteProtocolError(f"PCP answer of {len(data)} B")
    _, opcode, result, lifetime, epoch = _ANSWER.unpack_from(data)
    if result == Result.UNSUPP_VERSION:
        return VersionRefused(data[0])
    if opcode == _RESPONSE | _ANNOUNCE:
        return Announcement(epoch=epoch)
    if opcode != _RESPONSE | _MAP or len(data) < _ANSWER.size + _MAP_BODY.size:
        raise RemoteProtocolError(f"PCP opcode {opcode:#x} in {len(data)} B")
    nonce, protocol, internal, external, address = _MAP_BODY.unpack_from(
        data, _ANSWER.size
    )
    if protocol != _TCP:
        raise RemoteProtocolError(f"PCP mapping of protocol {protocol}")
    return MapAnswer(
        result=result,
        lifetime=lifetime,
        epoch=epoch,
        nonce=nonce,
        internal_port=internal,
        external_port=external,
        external_ip=unpack_address(address),
    )


def result_name(result: int) -> str:
    """Return a code's name, or its number."""
    return Result(result).name if result in Result.__members__.values() else str(result)


def pack_address(address: str) -> bytes:
    """Return 16 bytes; IPv4 goes as an IPv4-mapped address (RFC 6887 section 5)."""
    ip = ipaddress.ip_address(address)
    if ip.version == 4:
        return bytes(10) + b"\xff\xff" + ip.packed
    return ip.packed


def unpack_address(data: bytes) -> str:
    """Return the text of 16 bytes that :func:`pack_address` made."""
    ip = ipaddress.IPv6Address(data)
    return str(ip.ipv4_mapped or ip)


def _any_like(address: str) -> str:
    return "::" if ":" in address else "0.0.0.0"
