"""AutoNAT's messages, version 2 and version 1, and their doors.

Source: libp2p specs, autonat/autonat-v2.md and autonat/autonat-v1.md, "RPC messages".
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import base58
import msgspec

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId
from fabric.core.protobuf import (
    Fields,
    all_bytes,
    decode_message_untrusted,
    encode_fixed64,
    encode_message,
    last_bytes,
    last_int,
)
from nat.multiaddr_bytes import decode_multiaddr_untrusted, encode_multiaddr

PROTOCOL_V1 = "/libp2p/autonat/1.0.0"
PROTOCOL_DIAL_REQUEST = "/libp2p/autonat/2/dial-request"
PROTOCOL_DIAL_BACK = "/libp2p/autonat/2/dial-back"

MAX_MESSAGE_BYTES = 8192
"""One message: 32 addresses of 200 B, or 4 KiB of dial data with its wrapping."""
MAX_ADDRS = 32
"""Addresses of one request that are looked at; a host has a few per interface."""
DATA_CHUNK_BYTES = 4096
"""Dial data per message, at most (v2, "Amplification Attack Prevention")."""


class ResponseStatus(IntEnum):
    """How a v2 request went."""

    E_INTERNAL_ERROR = 0
    E_REQUEST_REJECTED = 100
    E_DIAL_REFUSED = 101
    OK = 200


class DialStatus(IntEnum):
    """How the dial-back of a v2 request went."""

    UNUSED = 0
    E_DIAL_ERROR = 100
    E_DIAL_BACK_ERROR = 101
    OK = 200


class StatusV1(IntEnum):
    """How a v1 request went."""

    OK = 0
    E_DIAL_ERROR = 100
    E_DIAL_REFUSED = 101
    E_BAD_REQUEST = 200
    E_INTERNAL_ERROR = 300


class DialRequest(msgspec.Struct, frozen=True):
    """Dial the first of these addresses that you will dial, and say ``nonce`` there.

    An address that we cannot read is None: the positions count.
    """

    addrs: tuple[str | None, ...]
    nonce: int


class DialResponse(msgspec.Struct, frozen=True):
    """What became of a request."""

    status: ResponseStatus
    index: int = 0
    dial: DialStatus = DialStatus.UNUSED


class DialDataRequest(msgspec.Struct, frozen=True):
    """Send this many bytes before a foreign IP address is dialled for you."""

    index: int
    num_bytes: int


class DialData(msgspec.Struct, frozen=True):
    """Some of those bytes; only their number counts."""

    size: int


MessageV2 = DialRequest | DialResponse | DialDataRequest | DialData


def encode_v2(message: MessageV2) -> bytes:
    """Return the bytes of one message on a dial-request stream."""
    if isinstance(message, DialRequest):
        addrs = [(1, encode_multiaddr(addr)) for addr in message.addrs if addr]
        inner = encode_message(addrs) + encode_fixed64(2, message.nonce)
        return encode_message([(1, inner)])
    if isinstance(message, DialResponse):
        inner = encode_message(
            [(1, message.status), (2, message.index), (3, message.dial)]
        )
        return encode_message([(2, inner)])
    if isinstance(message, DialDataRequest):
        inner = encode_message([(1, message.index), (2, message.num_bytes)])
        return encode_message([(3, inner)])
    return encode_message([(4, encode_message([(1, bytes(message.size))]))])


def decode_v2_untrusted(data: bytes) -> MessageV2:
    """Return the message in ``data``.

    Raises:
        RemoteProtocolError: none of the four, or malformed.
    """
    fields = decode_message_untrusted(data)
    number = max((n for n in fields if 1 <= n <= 4), default=0)  # a oneof holds one
    inner = decode_message_untrusted(last_bytes(fields, number)) if number else {}
    match number:
        case 1:
            return DialRequest(_addresses(inner, 1), last_int(inner, 2))
        case 2:
            return _response(inner)
        case 3:
            return DialDataRequest(last_int(inner, 1), last_int(inner, 2))
        case 4:
            return DialData(len(last_bytes(inner, 1)))
        case _:
            raise RemoteProtocolError("AutoNAT message without content")


def _response(fields: Fields) -> DialResponse:
    # a status that we do not understand voids the response (v2, "ResponseStatus")
    status, dial = last_int(fields, 1), last_int(fields, 3)
    try:
        return DialResponse(
            ResponseStatus(status), last_int(fields, 2), DialStatus(dial)
        )
    except ValueError as exc:
        raise RemoteProtocolError(f"AutoNAT status {status}, {dial}") from exc


def _addresses(fields: Fields, number: int) -> tuple[str | None, ...]:
    found: list[str | None] = []
    for raw in all_bytes(fields, number)[:MAX_ADDRS]:
        try:
            found.append(decode_multiaddr_untrusted(raw))
        except RemoteProtocolError:
            found.append(None)
    return tuple(found)


def encode_dial_back(nonce: int) -> bytes:
    """Return the message that proves a dial-back."""
    return encode_fixed64(1, nonce)


def decode_dial_back_untrusted(data: bytes) -> int:
    """Return the nonce of a dial-back.

    Raises:
        RemoteProtocolError: there is none.
    """
    fields = decode_message_untrusted(data)
    if 1 not in fields:
        raise RemoteProtocolError("dial-back without nonce")
    return last_int(fields, 1)


DIAL_BACK_OK = encode_message([(1, 0)])
"""A DialBackResponse whose status is OK."""


class DialV1(msgspec.Struct, frozen=True):
    """A v1 request: dial any of these addresses of mine."""

    peer: PeerId
    addrs: tuple[str | None, ...]


class ResponseV1(msgspec.Struct, frozen=True):
    """A v1 answer; ``addr`` is the one that was reached."""

    status: StatusV1
    text: str = ""
    addr: str | None = None


def encode_dial_v1(request: DialV1) -> bytes:
    """Return the bytes of a v1 request."""
    addrs = [(2, encode_multiaddr(addr)) for addr in request.addrs if addr]
    peer = encode_message([(1, base58.b58decode(request.peer)), *addrs])
    return encode_message([(1, 0), (2, encode_message([(1, peer)]))])


def decode_dial_v1_untrusted(data: bytes) -> DialV1:
    """Return the v1 request in ``data``.

    Raises:
        RemoteProtocolError: not one.
    """
    fields = decode_message_untrusted(data)
    if last_int(fields, 1) != 0 or 2 not in fields:
        raise RemoteProtocolError("AutoNAT v1: not a dial request")
    dial = decode_message_untrusted(last_bytes(fields, 2))
    peer = decode_message_untrusted(last_bytes(dial, 1))
    name = base58.b58encode(last_bytes(peer, 1)[:64]).decode()
    return DialV1(PeerId(name), _addresses(peer, 2))


def encode_response_v1(response: ResponseV1) -> bytes:
    """Return the bytes of a v1 answer."""
    addr = encode_multiaddr(response.addr) if response.addr else None
    inner = encode_message(
        [(1, response.status), (2, response.text.encode()), (3, addr)]
    )
    return encode_message([(1, 1), (3, inner)])


def decode_response_v1_untrusted(data: bytes) -> ResponseV1:
    """Return the v1 answer in ``data``; its text is for people.

    Raises:
        RemoteProtocolError: not one.
    """
    fields = decode_message_untrusted(data)
    if last_int(fields, 1) != 1 or 3 not in fields:
        raise RemoteProtocolError("AutoNAT v1: not a response")
    inner = decode_message_untrusted(last_bytes(fields, 3))
    raw = last_bytes(inner, 3)
    try:
        status = StatusV1(last_int(inner, 1))
    except ValueError as exc:
        raise RemoteProtocolError(f"AutoNAT v1 status: {exc}") from exc
    text = last_bytes(inner, 2)[:200].decode(errors="replace")
    return ResponseV1(status, text, decode_multiaddr_untrusted(raw) if raw else None)


def known_addresses(addrs: Sequence[str | None]) -> tuple[str, ...]:
    """Return the addresses that we could read."""
    return tuple(addr for addr in addrs if addr is not None)
