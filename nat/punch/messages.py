"""The messages of both punching protocols, and their doors: pure.

``/libp2p/dcutr`` (libp2p specs, relay/DCUtR.md) has one message: CONNECT with observed
addresses, or SYNC; in protobuf behind a varint length. ``/fabric/punch/1`` runs the
same dance for one data-plane socket and says more: a nonce that proves which socket
both ends hold, and what each side's NAT does; MessagePack in frames.

    initiator                                    responder
    PunchConnect(nonce, addresses, ..)      ->
                                            <-   PunchConnect or PunchRefused
    PunchSync                               ->   dials at once
    waits for half a round trip, dials
    on every socket that connects:
    its nonce                               ->
                                            <-   its own nonce, on one socket only
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.errors import FabricError, NoRoute, RemoteProtocolError, RemoteRefused
from fabric.core.protobuf import (
    all_bytes,
    decode_message_untrusted,
    delimited,
    encode_message,
    last_int,
)
from nat.multiaddr_bytes import decode_multiaddrs_untrusted, encode_multiaddr
from nat.punch.addresses import MAX_TARGETS
from nat.punch.facts import UNKNOWN, NatFacts

PROTOCOL_DCUTR = "/libp2p/dcutr"
PROTOCOL_PUNCH = "/fabric/punch/1"

CONNECT = 100
SYNC = 300
MAX_DCUTR_BYTES = 4096
"""Largest message accepted (DCUtR, "RPC messages")."""
NONCE_BYTES = 16

_Address = Annotated[str, msgspec.Meta(max_length=64)]
_Addresses = Annotated[tuple[_Address, ...], msgspec.Meta(max_length=MAX_TARGETS)]
_Text = Annotated[str, msgspec.Meta(max_length=500)]


class HolePunch(msgspec.Struct, frozen=True):
    """The message of ``/libp2p/dcutr``.

    Attributes:
        kind: CONNECT or SYNC.
        addrs: Observed addresses as text; on the wire they are binary.
    """

    kind: int
    addrs: tuple[str, ...] = ()


def encode_hole_punch(message: HolePunch) -> bytes:
    """Return ``message`` with its length in front."""
    addrs = [(2, encode_multiaddr(addr)) for addr in message.addrs]
    body = encode_message([(1, message.kind), *addrs])
    return delimited(body)


def decode_hole_punch_untrusted(body: bytes) -> HolePunch:
    """Return the message of ``body``, which is without its length.

    Raises:
        RemoteProtocolError: malformed, or of another type.
    """
    if len(body) > MAX_DCUTR_BYTES:
        raise RemoteProtocolError(f"HolePunch of {len(body)} B > {MAX_DCUTR_BYTES} B")
    fields = decode_message_untrusted(body)
    kind = last_int(fields, 1)
    if kind not in (CONNECT, SYNC):
        raise RemoteProtocolError(f"HolePunch of type {kind}")
    return HolePunch(kind, decode_multiaddrs_untrusted(all_bytes(fields, 2)))


class PunchConnect(msgspec.Struct, frozen=True, tag="connect"):
    """One side's end of the punch, sent by both.

    Attributes:
        nonce: Shown on the punched socket; new for each punch.
        addresses: "ip:port" of the punched port, best first.
        listeners: "ip:port" of the data-plane listener if the world reaches it: who
            connects there sends the *listener's* nonce in place of a label.
        facts: What this side's NAT does.
        held_seconds: How long the responder had the request, which is no part of the
            round trip.
    """

    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=16)]
    addresses: _Addresses = ()
    listeners: _Addresses = ()
    facts: NatFacts = UNKNOWN
    held_seconds: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.0


class PunchSync(msgspec.Struct, frozen=True, tag="sync"):
    """Dial now."""


class PunchRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The responder does not punch, or not now."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: _Text
    next_step: _Text = ""

    @classmethod
    def of(cls, error: FabricError) -> PunchRefused:
        """Return what the initiator may know of ``error``."""
        return cls(error.code[:64], error.reason[:500], error.next_step[:500])

    def as_error(self) -> FabricError:
        """Return the error to raise at the initiator."""
        if self.code.startswith("E_PUNCH_"):
            return NoRoute(self.reason, code=self.code, next_step=self.next_step)
        return RemoteRefused(self.reason, code=self.code, next_step=self.next_step)


PUNCH: Codec[PunchConnect | PunchSync | PunchRefused] = Codec(
    PunchConnect | PunchSync | PunchRefused, max_bytes=4096
)
