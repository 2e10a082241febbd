"""libp2p's signed envelopes: a payload, what it is, who says so and the proof.

    Envelope { bytes public_key = 1; bytes payload_type = 2; bytes payload = 3;
               bytes signature = 5; }

The signature covers domain, type and payload, each behind its length as a varint.
Source: libp2p specs, RFC 0002 "Signed Envelopes", sections "Wire Format" and "Signature
Production".
"""

from __future__ import annotations

import msgspec

from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import PeerId, peer_id_of
from fabric.core.protobuf import (
    decode_message_untrusted,
    delimited,
    encode_message,
    last_bytes,
)
from fabric.core.signing import Signer, verify

KEY_PREFIX = b"\x08\x01\x12\x20"
"""Protobuf PublicKey {1: Ed25519, 2: 32 bytes} (libp2p specs, peer-ids)."""


class EnvelopeKind(msgspec.Struct, frozen=True):
    """What envelopes of one use have in common.

    Attributes:
        domain: Separates its signatures from all others.
        payload_type: Multicodec of the payload.
        max_bytes: Largest envelope opened.
    """

    domain: bytes
    payload_type: bytes
    max_bytes: int


def seal(kind: EnvelopeKind, signer: Signer, payload: bytes) -> bytes:
    """Return ``payload`` in an envelope signed by ``signer``."""
    return encode_message(
        [
            (1, KEY_PREFIX + signer.public_key),
            (2, kind.payload_type),
            (3, payload),
            # the signer puts the domain in front
            (5, signer.sign(delimited(kind.domain), _signed_part(kind, payload))),
        ]
    )


def open_untrusted(kind: EnvelopeKind, data: bytes) -> tuple[PeerId, bytes]:
    """Return who sealed ``data``, and the payload.

    Raises:
        RemoteProtocolError: no envelope of this kind, or too large.
        IntegrityError: the signature does not match.
    """
    if len(data) > kind.max_bytes:
        raise RemoteProtocolError(f"envelope of {len(data)} B > {kind.max_bytes} B")
    fields = decode_message_untrusted(data)
    key, payload = last_bytes(fields, 1), last_bytes(fields, 3)
    if not key.startswith(KEY_PREFIX) or len(key) != len(KEY_PREFIX) + 32:
        raise RemoteProtocolError("the envelope's key is not Ed25519")
    if (said := last_bytes(fields, 2)) != kind.payload_type:
        raise RemoteProtocolError(f"envelope of type {said[:16].hex()}")
    public_key = key[len(KEY_PREFIX) :]
    signed, signature = _signed_part(kind, payload), last_bytes(fields, 5)
    if not verify(public_key, delimited(kind.domain), signed, signature):
        raise IntegrityError("the signature of an envelope does not match")
    return peer_id_of(public_key), payload


def _signed_part(kind: EnvelopeKind, payload: bytes) -> bytes:
    return delimited(kind.payload_type) + delimited(payload)
