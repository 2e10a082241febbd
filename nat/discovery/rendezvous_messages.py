"""Messages of the rendezvous protocol, ``/rendezvous/1.0.0``.

Source: libp2p specs, rendezvous/README.md, revision 3, "Protobuf". The revision before
it registered a PeerInfo {bytes id = 1; repeated bytes addrs = 2} where a signed peer
record stands now, with the same field number; py-libp2p 0.8 still does. A point serves
both; a client believes signed records only.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from fabric.core.errors import RemoteProtocolError
from fabric.core.protobuf import (
    Fields,
    Value,
    all_bytes,
    decode_message_untrusted,
    encode_message,
    last_bytes,
    last_int,
)

PROTOCOL_RENDEZVOUS = "/rendezvous/1.0.0"
MAX_REQUEST_BYTES = 16384
"""A registration with a full peer record."""
MAX_RESPONSE_BYTES = 1 << 20
"""PAGE registrations; below py-libp2p's bound of 4 MiB."""
PAGE = 100
"""Registrations in one answer; the cookie asks for the rest."""
MAX_NAMESPACE_CHARS = 255
"""Spec, "Recommendations for Rendezvous Points configurations"."""
MAX_COOKIE_BYTES = 64
MAX_STATUS_CHARS = 200


class Status(IntEnum):
    """Spec, "Protobuf", ResponseStatus."""

    OK = 0
    E_INVALID_NAMESPACE = 100
    E_INVALID_SIGNED_PEER_RECORD = 101
    E_INVALID_TTL = 102
    E_INVALID_COOKIE = 103
    E_NOT_AUTHORIZED = 200
    E_INTERNAL_ERROR = 300
    E_UNAVAILABLE = 400


class Register(msgspec.Struct, frozen=True):
    """Make the sender known in ``namespace``; a part of an answer too.

    Attributes:
        namespace: Where.
        record: Envelope with a signed peer record, or a PeerInfo of the old revision.
        ttl_seconds: How long; 0 for unsaid.
    """

    namespace: str
    record: bytes
    ttl_seconds: int = 0


class Unregister(msgspec.Struct, frozen=True):
    """Forget the sender in ``namespace``; has no answer."""

    namespace: str


class Discover(msgspec.Struct, frozen=True):
    """Ask who is in ``namespace``, new since ``cookie``."""

    namespace: str
    limit: int = 0
    cookie: bytes = b""


class Registered(msgspec.Struct, frozen=True):
    """RegisterResponse: how long the registration lives, or why there is none."""

    status: Status
    text: str = ""
    ttl_seconds: int = 0


class Found(msgspec.Struct, frozen=True):
    """DiscoverResponse."""

    status: Status
    text: str = ""
    registrations: tuple[Register, ...] = ()
    cookie: bytes = b""


Request = Register | Unregister | Discover
Response = Registered | Found


def encode_request(request: Request) -> bytes:
    """Return the message of a client."""
    match request:
        case Register():
            return _message(0, 2, _register(request))
        case Unregister(namespace):
            return _message(2, 4, encode_message([(1, namespace.encode())]))
        case Discover(namespace, limit, cookie):
            fields: list[tuple[int, Value | None]] = [(1, namespace.encode())]
            fields += [(2, limit or None), (3, cookie or None)]
            return _message(3, 5, encode_message(fields))


def encode_response(response: Response) -> bytes:
    """Return the message of a point."""
    text = response.text.encode() or None
    match response:
        case Registered(status, _, ttl):
            return _message(
                1, 3, encode_message([(1, int(status)), (2, text), (3, ttl)])
            )
        case Found(status, _, registrations, cookie):
            fields: list[tuple[int, Value | None]] = [
                (1, _register(registration)) for registration in registrations
            ]
            fields += [(2, cookie or None), (3, int(status)), (4, text)]
            return _message(4, 6, encode_message(fields))


def decode_request_untrusted(data: bytes) -> Request:
    """Return the request in ``data``.

    Raises:
        RemoteProtocolError: malformed, too large or not a request.
    """
    fields = _fields_untrusted(data, MAX_REQUEST_BYTES)
    kind = last_int(fields, 1)
    if kind == 0:
        return _register_untrusted(last_bytes(fields, 2))
    if kind == 2:
        body = decode_message_untrusted(last_bytes(fields, 4))
        return Unregister(_namespace_untrusted(body))
    if kind == 3:
        body = decode_message_untrusted(last_bytes(fields, 5))
        return Discover(
            _namespace_untrusted(body), last_int(body, 2), last_bytes(body, 3)
        )
    raise RemoteProtocolError(f"rendezvous message of type {kind} is no request")


def decode_response_untrusted(data: bytes) -> Response:
    """Return the response in ``data``.

    Raises:
        RemoteProtocolError: malformed, too large or not a response.
    """
    fields = _fields_untrusted(data, MAX_RESPONSE_BYTES)
    kind = last_int(fields, 1)
    if kind == 1:
        body = decode_message_untrusted(last_bytes(fields, 3))
        return Registered(
            _status_untrusted(body, 1), _text_untrusted(body, 2), last_int(body, 3)
        )
    if kind == 4:
        body = decode_message_untrusted(last_bytes(fields, 6))
        cookie = last_bytes(body, 2)
        if len(cookie) > MAX_COOKIE_BYTES:
            raise RemoteProtocolError(f"rendezvous cookie of {len(cookie)} B")
        listed = all_bytes(body, 1)[: 2 * PAGE]
        return Found(
            _status_untrusted(body, 3),
            _text_untrusted(body, 4),
            tuple(_register_untrusted(raw) for raw in listed),
            cookie,
        )
    raise RemoteProtocolError(f"rendezvous message of type {kind} is no response")


def _message(kind: int, number: int, body: bytes) -> bytes:
    return encode_message([(1, kind), (number, body)])


def _register(request: Register) -> bytes:
    return encode_message(
        [
            (1, request.namespace.encode()),
            (2, request.record),
            (3, request.ttl_seconds or None),
        ]
    )


def _fields_untrusted(data: bytes, limit: int) -> Fields:
    if len(data) > limit:
        raise RemoteProtocolError(f"rendezvous message of {len(data)} B > {limit} B")
    return decode_message_untrusted(data)


def _register_untrusted(data: bytes) -> Register:
    fields = decode_message_untrusted(data)
    return Register(
        _namespace_untrusted(fields), last_bytes(fields, 2), last_int(fields, 3)
    )


def _namespace_untrusted(fields: Fields) -> str:
    raw = last_bytes(fields, 1)
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError("rendezvous namespace is not UTF-8") from exc


def _status_untrusted(fields: Fields, number: int) -> Status:
    value = last_int(fields, number)
    try:
        return Status(value)
    except ValueError:
        return Status.E_INTERNAL_ERROR


def _text_untrusted(fields: Fields, number: int) -> str:
    text = last_bytes(fields, number)[: 4 * MAX_STATUS_CHARS].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_STATUS_CHARS]
