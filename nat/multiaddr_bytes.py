"""Multiaddrs in binary, as libp2p's messages carry them; elsewhere they are text.

A multiaddr is a list of (protocol code, value); codes and the lengths of variable
values are unsigned varints. Only what our transports meet is known: an address with any
other protocol is skipped by who reads a list, because the sender may speak transports
that we do not. Source: libp2p specs, addressing/README.md; multiformats,
multiaddr/protocols.csv.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import base58

from fabric.core.errors import RemoteProtocolError
from fabric.core.protobuf import decode_varint_untrusted, encode_varint

MAX_MULTIADDR_BYTES = 256
"""A circuit address, the longest that we read, has below 120."""
_MAX_PARTS = 8
_VARIABLE = -1


@dataclass(frozen=True)
class _Protocol:
    code: int
    size: int
    """Bytes of the value, or _VARIABLE: then a varint says."""
    write: Callable[[str], bytes] = lambda _: b""
    read: Callable[[bytes], str] = lambda _: ""


def _write_port(text: str) -> bytes:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port")
    return int(text).to_bytes(2, "big")


def _read_port(value: bytes) -> str:
    return str(int.from_bytes(value, "big"))


_PROTOCOLS = {
    "ip4": _Protocol(
        4,
        4,
        lambda text: ipaddress.IPv4Address(text).packed,
        lambda value: str(ipaddress.IPv4Address(value)),
    ),
    "ip6": _Protocol(
        41,
        16,
        lambda text: ipaddress.IPv6Address(text).packed,
        lambda value: str(ipaddress.IPv6Address(value)),
    ),
    "tcp": _Protocol(6, 2, _write_port, _read_port),
    "udp": _Protocol(273, 2, _write_port, _read_port),
    "quic-v1": _Protocol(461, 0),
    "p2p-circuit": _Protocol(290, 0),
    "p2p": _Protocol(
        421,
        _VARIABLE,
        lambda text: base58.b58decode(text),
        lambda value: base58.b58encode(value).decode(),
    ),
}
_NAMES = {protocol.code: name for name, protocol in _PROTOCOLS.items()}


def encode_multiaddr(text: str) -> bytes:
    """Return the binary form of ``text``, as in ``/ip4/192.0.2.1/tcp/4801``.

    Raises:
        ValueError: malformed, or a protocol that is not known here.
    """
    if not text.startswith("/"):
        raise ValueError(f"{text!r} does not start with '/'")
    parts = text[1:].split("/")
    out = bytearray()
    while parts:
        name = parts.pop(0)
        protocol = _PROTOCOLS.get(name)
        if protocol is None:
            raise ValueError(f"{text!r} has the unknown protocol {name!r}")
        out += encode_varint(protocol.code)
        if protocol.size == 0:
            continue
        if not parts:
            raise ValueError(f"{text!r} ends without a value of {name!r}")
        value = protocol.write(parts.pop(0))
        out += encode_varint(len(value)) if protocol.size == _VARIABLE else b""
        out += value
    return bytes(out)


def decode_multiaddr_untrusted(data: bytes) -> str | None:
    """Return the text form, or None if a protocol of it is not known here.

    Raises:
        RemoteProtocolError: empty, truncated or too long.
    """
    if not 0 < len(data) <= MAX_MULTIADDR_BYTES:
        raise RemoteProtocolError(f"multiaddr of {len(data)} B")
    text, at = [], 0
    for _ in range(_MAX_PARTS):
        if at == len(data):
            break
        code, at = decode_varint_untrusted(data, at)
        name = _NAMES.get(code)
        if name is None:
            return None
        protocol = _PROTOCOLS[name]
        size = protocol.size
        if size == _VARIABLE:
            size, at = decode_varint_untrusted(data, at)
        if size > len(data) - at:
            raise RemoteProtocolError(f"multiaddr ends inside its {name}")
        text.append(name)
        if size:
            text.append(protocol.read(data[at : at + size]))
        elif protocol.size:
            raise RemoteProtocolError(f"multiaddr with an empty {name}")
        at += size
    if at != len(data):
        raise RemoteProtocolError(f"multiaddr of more than {_MAX_PARTS} protocols")
    return "/" + "/".join(text)


def decode_multiaddrs_untrusted(values: Iterable[bytes]) -> tuple[str, ...]:
    """Return those that are well-formed and known, each once, in their order.

    One address that cannot be read does not void the others: a sender with a newer
    transport must still be reachable over TCP.
    """
    found: dict[str, None] = {}
    for value in values:
        try:
            text = decode_multiaddr_untrusted(value)
        except RemoteProtocolError:
            continue
        if text is not None:
            found[text] = None
    return tuple(found)


def tcp_endpoint(multiaddr: str) -> tuple[str, int] | None:
    """Return (IP, port) of ``/ip4|ip6/../tcp/N[/p2p/ID]``, or None for any other."""
    parts = multiaddr.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp":
        return None
    if len(parts) == 7 and parts[5] != "p2p":
        return None
    try:
        ip = ipaddress.ip_address(parts[2])
        port = int.from_bytes(_write_port(parts[4]), "big")
    except ValueError:
        return None
    if parts[1] != f"ip{ip.version}":
        return None
    return str(ip), port


def tcp_multiaddr(ip: str, port: int) -> str:
    """Return ``/ip4/IP/tcp/PORT``, or ``/ip6/..``."""
    return f"/ip{ipaddress.ip_address(ip).version}/{ip}/tcp/{port}"
