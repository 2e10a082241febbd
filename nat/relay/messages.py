"""Messages of circuit relay v2: hop (client and relay) and stop (relay and target).

    client                     relay                       target
    HopReserve             ->
                           <-  HopStatus(OK, reservation, limit)
    HopConnect(target)     ->
                               StopConnect(client, limit)  ->
                                                           <-  StopStatus(OK)
                           <-  HopStatus(OK, limit)
    bytes                  <-> bytes                      <-> bytes

Each message is protobuf behind its length as a varint; ``encode_*`` returns both,
``decode_*_untrusted`` takes the body alone. Source: libp2p specs, relay/circuit-v2.md,
revision 3, "Protobuf".
"""

from __future__ import annotations

from enum import IntEnum

import base58
import msgspec

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId, public_key_of
from fabric.core.protobuf import (
    Fields,
    Value,
    all_bytes,
    decode_message_untrusted,
    delimited,
    encode_message,
    last_bytes,
    last_int,
)
from nat.multiaddr_bytes import decode_multiaddrs_untrusted, encode_multiaddr

PROTOCOL_HOP = "/libp2p/circuit/relay/0.2.0/hop"
PROTOCOL_STOP = "/libp2p/circuit/relay/0.2.0/stop"
PROTOCOL_VIA = "/fabric/via/1"
"""As hop, between members only: CONNECT without a reservation, to whoever is connected
with a member that need not be public. So two members reach each other through any third
when no relay is left."""
MAX_RELAY_MESSAGE_BYTES = 4096
"""Largest message accepted; go-libp2p's bound. 16 addresses and a voucher fit."""
MAX_ADDRS = 16

_RESERVE, _CONNECT, _STATUS = 0, 1, 2
_STOP_CONNECT, _STOP_STATUS = 0, 1


class Status(IntEnum):
    """Spec, "Protobuf", Status. A peer may send others; they are no success."""

    UNUSED = 0
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What the relay lets one circuit carry; 0 is no limit.

    Attributes:
        duration_seconds: Longest life.
        data_bytes: Most bytes in each direction.
    """

    duration_seconds: int = 0
    data_bytes: int = 0

    @property
    def unlimited(self) -> bool:
        """Whether it limits nothing: then it is left out on the wire."""
        return not (self.duration_seconds or self.data_bytes)


UNLIMITED = Limit()


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A relay's promise to connect others with the holder.

    Attributes:
        expires_unix_seconds: When it ends, by the relay's clock.
        addrs: The relay's addresses, each ending in ``/p2p/RELAY``.
        voucher: Envelope in which the relay signs the promise; advisory.
    """

    expires_unix_seconds: int
    addrs: tuple[str, ...] = ()
    voucher: bytes = b""


class HopReserve(msgspec.Struct, frozen=True):
    """Reserve for the sender."""


class HopConnect(msgspec.Struct, frozen=True):
    """Connect the sender with ``peer``."""

    peer: PeerId


class HopStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The relay's answer; ``status`` may be a code that we do not know."""

    status: int
    reservation: Reservation | None = None
    limit: Limit = UNLIMITED


class StopConnect(msgspec.Struct, frozen=True):
    """Accept a circuit from ``peer``, as the relay says."""

    peer: PeerId
    limit: Limit = UNLIMITED


class StopStatus(msgspec.Struct, frozen=True):
    """The target's answer."""

    status: int


HopMessage = HopReserve | HopConnect | HopStatus
StopMessage = StopConnect | StopStatus


def status_name(status: int) -> str:
    """Return the name of ``status``, or its number."""
    return Status(status).name if status in Status.__members__.values() else str(status)


def peer_to_bytes(peer: PeerId) -> bytes:
    """Return the multihash that ``peer`` is the text of."""
    return bytes(base58.b58decode(peer))


def encode_hop(message: HopMessage) -> bytes:
    """Return ``message`` with its length in front."""
    match message:
        case HopReserve():
            return _framed([(1, _RESERVE)])
        case HopConnect(peer):
            return _framed([(1, _CONNECT), (2, _peer(peer))])
        case HopStatus():
            return _framed(
                [
                    (1, _STATUS),
                    (3, _reservation(message.reservation)),
                    (4, _limit(message.limit)),
                    (5, message.status),
                ]
            )


def encode_stop(message: StopMessage) -> bytes:
    """Return ``message`` with its length in front."""
    match message:
        case StopConnect(peer, limit):
            return _framed([(1, _STOP_CONNECT), (2, _peer(peer)), (3, _limit(limit))])
        case StopStatus(status):
            return _framed([(1, _STOP_STATUS), (4, status)])


def _framed(fields: list[tuple[int, Value | None]]) -> bytes:
    body = encode_message(fields)
    return delimited(body)


def _peer(peer: PeerId) -> bytes:
    return encode_message([(1, peer_to_bytes(peer))])


def _limit(limit: Limit) -> bytes | None:
    if limit.unlimited:
        return None
    return encode_message([(1, limit.duration_seconds), (2, limit.data_bytes)])


def _reservation(reservation: Reservation | None) -> bytes | None:
    if reservation is None:
        return None
    addrs = [(2, encode_multiaddr(addr)) for addr in reservation.addrs[:MAX_ADDRS]]
    return encode_message(
        [
            (1, reservation.expires_unix_seconds),
            *addrs,
            (3, reservation.voucher or None),
        ]
    )


def decode_hop_untrusted(body: bytes) -> HopMessage:
    """Return the message of ``body``.

    Raises:
        RemoteProtocolError: malformed, too long, or of another type.
    """
    fields = _fields_untrusted(body)
    kind = last_int(fields, 1)
    if kind == _RESERVE:
        return HopReserve()
    if kind == _CONNECT:
        return HopConnect(_decode_peer_untrusted(fields))
    if kind == _STATUS:
        return HopStatus(
            status=last_int(fields, 5),
            reservation=_decode_reservation_untrusted(fields),
            limit=_decode_limit_untrusted(fields, 4),
        )
    raise RemoteProtocolError(f"HopMessage of type {kind}")


def decode_stop_untrusted(body: bytes) -> StopMessage:
    """Return the message of ``body``.

    Raises:
        RemoteProtocolError: malformed, too long, or of another type.
    """
    fields = _fields_untrusted(body)
    kind = last_int(fields, 1)
    if kind == _STOP_CONNECT:
        limit = _decode_limit_untrusted(fields, 3)
        return StopConnect(_decode_peer_untrusted(fields), limit)
    if kind == _STOP_STATUS:
        return StopStatus(last_int(fields, 4))
    raise RemoteProtocolError(f"StopMessage of type {kind}")


def _fields_untrusted(body: bytes) -> Fields:
    if len(body) > MAX_RELAY_MESSAGE_BYTES:
        raise RemoteProtocolError(
            f"relay message of {len(body)} B > {MAX_RELAY_MESSAGE_BYTES} B"
        )
    fields = decode_message_untrusted(body)
    if 1 not in fields:  # "Users should make sure to always set this."
        raise RemoteProtocolError("relay message without a type")
    return fields


def _decode_peer_untrusted(fields: Fields) -> PeerId:
    raw = last_bytes(decode_message_untrusted(last_bytes(fields, 2)), 1)
    if not 0 < len(raw) <= 64:
        raise RemoteProtocolError(f"peer id of {len(raw)} B")
    peer = base58.b58encode(raw).decode()
    public_key_of(peer)  # Ed25519 ids only, as everywhere in the control plane
    return PeerId(peer)


def _decode_limit_untrusted(fields: Fields, number: int) -> Limit:
    inner = decode_message_untrusted(last_bytes(fields, number))
    return Limit(duration_seconds=last_int(inner, 1), data_bytes=last_int(inner, 2))


def _decode_reservation_untrusted(fields: Fields) -> Reservation | None:
    if 3 not in fields:
        return None
    inner = decode_message_untrusted(last_bytes(fields, 3))
    return Reservation(
        expires_unix_seconds=last_int(inner, 1),
        addrs=decode_multiaddrs_untrusted(all_bytes(inner, 2)[:MAX_ADDRS]),
        voucher=last_bytes(inner, 3),
    )
