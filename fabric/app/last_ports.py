"""The ports of the last run, taken again: remembered addresses and forwards stay good.

Port 0 in the settings means "any". A peer that gets another one at each start cannot be
found again by who only remembers it, and a router forgets what it mapped.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from fabric.core.errors import RemoteProtocolError
from fabric.net.config import HostConfig
from fabric.net.data_config import DataConfig
from fabric.net.offers import format_address, ip_of_multiaddr, parse_address_untrusted

MAX_FILE_BYTES = 1024
_ANY_PORT = "/tcp/0"

Port = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]


class LastPorts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What this peer listened on when it ran last; 0 is unknown."""

    control: Port = 0
    data: Port = 0


def load_ports(path: Path) -> LastPorts:
    """Return the ports in ``path``; a missing or damaged file knows none."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=LastPorts)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return LastPorts()


def save_ports(path: Path, ports: LastPorts) -> None:
    """Write ``ports`` to ``path``."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(ports))
    temporary.replace(path)


def port_of(addrs: Sequence[str]) -> int:
    """Return the TCP port of the first multiaddr that has one, or 0."""
    ports = (addr.split("/")[4] for addr in addrs if ip_of_multiaddr(addr))
    return next((int(port) for port in ports), 0)


def settle(
    host: HostConfig, data: DataConfig, last: LastPorts
) -> tuple[HostConfig, DataConfig]:
    """Return the settings with "any" replaced by the last port where that is free.

    An empty ``data.listen`` becomes the addresses of the control plane.
    """
    listen = tuple(_with_port(addr, last.control) for addr in host.listen)
    ips = dict.fromkeys(ip for addr in listen if (ip := ip_of_multiaddr(addr)))
    texts = data.listen.split(",") if data.listen else []
    texts = texts or [format_address(ip, 0) for ip in ips or ("127.0.0.1",)]
    try:
        ends = [parse_address_untrusted(text.strip()) for text in texts]
    except RemoteProtocolError:  # the data plane reports it, as the operator's
        return msgspec.structs.replace(host, listen=listen), data
    settled = (
        format_address(ip, port or (last.data if _is_free(ip, last.data) else 0))
        for ip, port in ends
    )
    return (
        msgspec.structs.replace(host, listen=listen),
        msgspec.structs.replace(data, listen=",".join(settled)),
    )


def _with_port(addr: str, port: int) -> str:
    ip = ip_of_multiaddr(addr)
    if ip is None or not addr.endswith(_ANY_PORT) or not _is_free(ip, port):
        return addr
    return f"{addr.removesuffix(_ANY_PORT)}/tcp/{port}"


def _is_free(ip: str, port: int) -> bool:
    if not port:
        return False
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((ip, port))
        except OSError:
            return False
    return True
