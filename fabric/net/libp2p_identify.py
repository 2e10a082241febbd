"""What a peer says of itself, and from where it sees us come: libp2p's identify.

The question is asked on a connection that is chosen, not on the best one: an observed
address means something only together with our own end of that very socket.

Source: libp2p specs, identify/README.md.
"""

from __future__ import annotations

import msgspec
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from fabric.core.errors import RemoteProtocolError, RemoteRefused, Unavailable
from fabric.core.ids import PeerId, short
from fabric.core.protobuf import (
    all_bytes,
    decode_message_untrusted,
    last_bytes,
)
from fabric.net.delimited import receive_message_untrusted
from fabric.net.libp2p_host import Libp2pHost
from fabric.net.libp2p_stream import Libp2pStream, reset
from fabric.net.offers import format_address
from fabric.net.traversal_api import ConnectionInfo

IDENTIFY_PROTOCOL = "/ipfs/id/1.0.0"
MAX_MESSAGE_BYTES = 64 * 1024
"""An identify message; a host with hundreds of protocols stays below 20 KiB."""
MAX_ADDRS = 32
MAX_PROTOCOLS = 128
MAX_TEXT = 256
"""Characters of one protocol id, address or agent name."""
_FIELD_LISTEN, _FIELD_PROTOCOLS, _FIELD_OBSERVED, _FIELD_AGENT = 2, 3, 4, 6
_NEVER_SECONDS = 10**9
_MAX_LENGTH_BYTES = 10


class Identified(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, with what it was asked on.

    Attributes:
        observed: "ip:port" where the peer sees our end; None when it does not say.
        protocols: What it serves, as it says.
        addrs: Where it listens, as it says.
        agent: Its software.
        connection: The connection that was asked.
    """

    observed: str | None = None
    protocols: tuple[str, ...] = ()
    addrs: tuple[str, ...] = ()
    agent: str = ""
    connection: ConnectionInfo = ConnectionInfo(kind="direct", outbound=True)


async def identify(host: Libp2pHost, peer: PeerId) -> Identified:
    """Return what ``peer`` says on the direct connection that tells most.

    That is one we dialled, for a NAT maps it; else one the peer dialled; never a
    relayed one, where nobody observes us. Bound it with ``trio.fail_after``.

    Raises:
        Unavailable: no direct connection, or it broke.
        RemoteRefused: the peer does not identify itself.
        RemoteProtocolError: the answer is malformed.
    """
    connection, info = _choose(host, peer)
    try:
        raw = await connection.new_stream()
    except BaseLibp2pError as exc:
        raise Unavailable(f"{short(peer)} left: {exc}") from exc
    try:
        await _agree(raw, peer)
        data = await receive_message_untrusted(Libp2pStream(raw), MAX_MESSAGE_BYTES)
    finally:
        reset(raw)
    return msgspec.structs.replace(decode_identify_untrusted(data), connection=info)


def _choose(host: Libp2pHost, peer: PeerId) -> tuple[INetConn, ConnectionInfo]:
    known = [(found, host.links.info(found)) for found in host.links.of(peer)]
    direct = [pair for pair in known if pair[1].kind == "direct"]
    if not direct:
        raise Unavailable(
            f"no direct connection with {short(peer)}", code="E_NOT_CONNECTED"
        )
    return next((pair for pair in direct if pair[1].outbound), direct[0])


async def _agree(stream: INetStream, peer: PeerId) -> None:
    try:
        await MultiselectClient().select_one_of(
            [TProtocol(IDENTIFY_PROTOCOL)],
            MultiselectCommunicator(stream),
            _NEVER_SECONDS,
        )
    except MultiselectClientError as exc:
        raise RemoteRefused(f"{short(peer)} does not identify itself: {exc}") from exc


def decode_identify_untrusted(data: bytes) -> Identified:
    """Return what an identify message says.

    Addresses that we cannot read are left out, and so is what is above a bound.

    Raises:
        RemoteProtocolError: not such a message, or a text of it is too long.
    """
    fields = decode_message_untrusted(data)
    protocols = all_bytes(fields, _FIELD_PROTOCOLS)[:MAX_PROTOCOLS]
    listen = all_bytes(fields, _FIELD_LISTEN)[:MAX_ADDRS]
    addrs = (_multiaddr(addr) for addr in listen)
    return Identified(
        observed=_observed(last_bytes(fields, _FIELD_OBSERVED)),
        protocols=tuple(_text(protocol) for protocol in protocols),
        addrs=tuple(str(addr) for addr in addrs if addr is not None),
        agent=_text(last_bytes(fields, _FIELD_AGENT)),
    )


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT:
        raise RemoteProtocolError(f"identify text of {len(data)} B")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError("identify text is not UTF-8") from exc


def _multiaddr(data: bytes) -> Multiaddr | None:
    if not data or len(data) > MAX_TEXT:
        return None
    try:
        addr = Multiaddr(data)
        str(addr)  # the library reads lazily
    except (MultiaddrError, ValueError, IndexError, KeyError, TypeError):
        return None
    return addr


def _observed(data: bytes) -> str | None:
    """Return "ip:port" of a TCP address; a relayed one tells nothing about us."""
    addr = _multiaddr(data)
    parts = str(addr).split("/") if addr is not None else []
    if len(parts) != 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        return None
    return format_address(parts[2], int(parts[4]))
