"""NAT Port Mapping Protocol: external address and TCP mappings.

The predecessor of PCP, on the same port and still what many home routers speak. It has
no nonce, so an answer counts only when it comes from the gateway's address and port and
matches a request that is open (RFC 6886 sections 3.1 to 3.5).

Source: RFC 6886, "NAT Port Mapping Protocol (NAT-PMP)".
"""

from __future__ import annotations

import ipaddress
import struct
from enum import IntEnum

import msgspec

from fabric.core.errors import RemoteProtocolError

VERSION = 0
MAX_BYTES = 16

_ADDRESS, _MAP_TCP = 0, 2
_RESPONSE = 0x80
_HEADER = struct.Struct("!BBHI")
_MAP_REQUEST = struct.Struct("!BBxxHHI")
_MAP_ANSWER = struct.Struct("!BBHIHHI")


class Result(IntEnum):
    """Result codes (RFC 6886 section 3.5)."""

    SUCCESS = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


class AddressAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The router's external address; "" when ``result`` is a failure."""

    result: int
    epoch: int
    external_ip: str


class MapAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A mapping granted, removed (lifetime 0) or refused."""

    result: int
    epoch: int
    internal_port: int
    external_port: int
    lifetime: int


Answer = AddressAnswer | MapAnswer


def encode_address_request() -> bytes:
    """Return the request for the external address."""
    return bytes([VERSION, _ADDRESS])


def encode_map(internal_port: int, external_port: int, lifetime: int) -> bytes:
    """Return the request for a TCP mapping; lifetime 0 and port 0 remove it."""
    return _MAP_REQUEST.pack(VERSION, _MAP_TCP, internal_port, external_port, lifetime)


def decode_untrusted(data: bytes) -> Answer:
    """Return what a packet from the gateway's NAT-PMP port says.

    Raises:
        RemoteProtocolError: not version 0, truncated, too long, or not an answer to
            one of our two requests.
    """
    if not _HEADER.size <= len(data) <= MAX_BYTES:
        raise RemoteProtocolError(f"NAT-PMP answer of {len(data)} B")
    version, opcode, result, epoch = _HEADER.unpack_from(data)
    if version != VERSION:
        raise RemoteProtocolError(f"NAT-PMP version {version}")
    if opcode == _RESPONSE | _ADDRESS:
        return AddressAnswer(result=result, epoch=epoch, external_ip=_address(data))
    if opcode == _RESPONSE | _MAP_TCP and len(data) == _MAP_ANSWER.size:
        _, _, _, _, internal, external, lifetime = _MAP_ANSWER.unpack(data)
        return MapAnswer(
            result=result,
            epoch=epoch,
            internal_port=internal,
            external_port=external,
            lifetime=lifetime,
        )
    raise RemoteProtocolError(f"NAT-PMP opcode {opcode:#x} in {len(data)} B")


def result_name(result: int) -> str:
    """Return a code's name, or its number."""
    return Result(result).name if result in Result.__members__.values() else str(result)


def _address(data: bytes) -> str:
    """Return the address of an answer; a refusal may leave it out."""
    if len(data) < _HEADER.size + 4:
        return ""
    return str(ipaddress.IPv4Address(data[_HEADER.size : _HEADER.size + 4]))
