"""Reservation vouchers: a relay's signed word that it serves a peer.

    Envelope { bytes public_key = 1; bytes payload_type = 2; bytes payload = 3;
               bytes signature = 5; }
    Voucher  { bytes relay = 1; bytes peer = 2; uint64 expiration = 3; }

The signature covers domain, type and payload, each behind its length as a varint.
Sources: libp2p specs, RFC 0002 "Signature Production", and relay/circuit-v2.md,
"Reservation Vouchers", which says that they are advisory: ours are made and not asked.
"""

from __future__ import annotations

from fabric.core.ids import PeerId
from fabric.core.protobuf import encode_message, encode_varint
from fabric.core.signing import Signer
from nat.relay.messages import peer_to_bytes

DOMAIN = b"libp2p-relay-rsvp"
PAYLOAD_TYPE = encode_varint(0x0302)
"""Multicodec of a voucher."""
_KEY_PREFIX = b"\x08\x01\x12\x20"
"""Protobuf PublicKey {1: Ed25519, 2: 32 bytes} (libp2p specs, peer-ids)."""


def seal_voucher(signer: Signer, peer: PeerId, expires_unix_seconds: int) -> bytes:
    """Return the envelope in which we, the relay, promise to serve ``peer``."""
    payload = encode_message(
        [
            (1, peer_to_bytes(signer.peer_id)),
            (2, peer_to_bytes(peer)),
            (3, expires_unix_seconds),
        ]
    )
    signed = b"".join(encode_varint(len(p)) + p for p in (PAYLOAD_TYPE, payload))
    return encode_message(
        [
            (1, _KEY_PREFIX + signer.public_key),
            (2, PAYLOAD_TYPE),
            (3, payload),
            # the signer puts the domain in front
            (5, signer.sign(encode_varint(len(DOMAIN)) + DOMAIN, signed)),
        ]
    )
