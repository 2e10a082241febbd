"""Reservation vouchers: a relay's signed word that it serves a peer.

    Voucher { bytes relay = 1; bytes peer = 2; uint64 expiration = 3; }

in an envelope (``fabric/core/envelope.py``). Source: libp2p specs, relay/circuit-v2.md,
"Reservation Vouchers", which says that they are advisory: ours are made and not asked.
"""

from __future__ import annotations

from fabric.core.envelope import EnvelopeKind, seal
from fabric.core.ids import PeerId
from fabric.core.protobuf import encode_message, encode_varint
from fabric.core.signing import Signer
from nat.relay.messages import peer_to_bytes

VOUCHER = EnvelopeKind(b"libp2p-relay-rsvp", encode_varint(0x0302), max_bytes=1024)


def seal_voucher(signer: Signer, peer: PeerId, expires_unix_seconds: int) -> bytes:
    """Return the envelope in which we, the relay, promise to serve ``peer``."""
    payload = encode_message(
        [
            (1, peer_to_bytes(signer.peer_id)),
            (2, peer_to_bytes(peer)),
            (3, expires_unix_seconds),
        ]
    )
    return seal(VOUCHER, signer, payload)
