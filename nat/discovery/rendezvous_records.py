"""Signed peer records: addresses that a peer vouches for, verifiable by anybody.

    Envelope { bytes public_key = 1; bytes payload_type = 2; bytes payload = 3;
               bytes signature = 5; }
    PeerRecord { bytes peer_id = 1; uint64 seq = 2;
                 repeated AddressInfo { bytes multiaddr = 1; } addresses = 3; }

The signature covers domain, type and payload, each with its length as a varint before
it. Sources: libp2p specs, RFC 0002 (envelopes) and RFC 0003 (routing records); domain
and type as implementations send them (go-libp2p, rust-libp2p, js-libp2p and py-libp2p
agree): "libp2p-peer-record" and the two bytes 03 01.
"""

from __future__ import annotations

from collections.abc import Sequence

import base58
import msgspec

from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import PeerId, peer_id_of, public_key_of
from fabric.core.protobuf import (
    all_bytes,
    decode_message_untrusted,
    encode_message,
    encode_varint,
    last_bytes,
    last_int,
)
from fabric.core.signing import Signer, verify
from nat.multiaddr_bytes import decode_multiaddrs_untrusted, encode_multiaddr

DOMAIN = b"libp2p-peer-record"
PAYLOAD_TYPE = b"\x03\x01"
MAX_ADDRS = 16
MAX_ENVELOPE_BYTES = 4096
"""16 circuit addresses have below 2,000 bytes. A point keeps thousands of these."""
_KEY_PREFIX = b"\x08\x01\x12\x20"
"""Protobuf PublicKey {1: Ed25519, 2: 32 bytes} (libp2p specs, peer-ids)."""


class PeerRecord(msgspec.Struct, frozen=True):
    """Who can be reached where.

    Attributes:
        peer: Who.
        seq: Grows with each record of the peer.
        addrs: Multiaddrs without the peer's own ``/p2p/``.
    """

    peer: PeerId
    seq: int
    addrs: tuple[str, ...]


class Sighting(msgspec.Struct, frozen=True):
    """A peer that a point knows.

    Attributes:
        record: Its addresses, signed by itself.
        ttl_seconds: How long its registration still lives.
    """

    record: PeerRecord
    ttl_seconds: float


def without_peer(addr: str, peer: PeerId) -> str:
    """Return ``addr`` without ``/p2p/<peer>`` at its end."""
    return addr.removesuffix(f"/p2p/{peer}")


def id_to_bytes(peer: PeerId) -> bytes:
    """Return the multihash that ``peer`` is the text of."""
    return bytes(base58.b58decode(peer))


def id_from_bytes_untrusted(data: bytes) -> PeerId:
    """Return the PeerId of an Ed25519 key in its binary form.

    Raises:
        RemoteProtocolError: another kind of key, or no id at all.
    """
    if len(data) > 64:
        raise RemoteProtocolError(f"peer id of {len(data)} B")
    peer = base58.b58encode(data).decode()
    public_key_of(peer)
    return PeerId(peer)


def encode_record(record: PeerRecord) -> bytes:
    """Return the payload of an envelope."""
    infos = [
        encode_message([(1, raw)])
        for raw in addrs_to_bytes(record.addrs, record.peer)[:MAX_ADDRS]
    ]
    return encode_message(
        [
            (1, id_to_bytes(record.peer)),
            (2, record.seq),
            *((3, info) for info in infos),
        ]
    )


def addrs_to_bytes(addrs: Sequence[str], peer: PeerId) -> list[bytes]:
    """Return the binary form of ``peer``'s addresses; those it lacks are left out."""
    raws = []
    for addr in addrs:
        try:
            raws.append(encode_multiaddr(without_peer(addr, peer)))
        except ValueError:
            continue  # a name or a transport that has no binary form here
    return raws


def seal_record(signer: Signer, addrs: Sequence[str], seq: int) -> bytes:
    """Return our addresses in an envelope signed by us.

    Args:
        signer: Us.
        addrs: Multiaddrs; at most MAX_ADDRS are taken.
        seq: Must grow; Unix seconds will do (RFC 0003, "Address Record Format").
    """
    payload = encode_record(PeerRecord(signer.peer_id, seq, tuple(addrs)))
    # the first length and string are the domain tag, the signer prepends it
    domain = encode_varint(len(DOMAIN)) + DOMAIN
    return encode_message(
        [
            (1, _KEY_PREFIX + signer.public_key),
            (2, PAYLOAD_TYPE),
            (3, payload),
            (5, signer.sign(domain, _signed_part(PAYLOAD_TYPE, payload))),
        ]
    )


def open_record_untrusted(data: bytes) -> PeerRecord:
    """Return the record in an envelope whose signature holds.

    Raises:
        RemoteProtocolError: no envelope of a peer record, or out of bounds.
        IntegrityError: the signature or the signer does not match.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise RemoteProtocolError(f"envelope of {len(data)} B > {MAX_ENVELOPE_BYTES} B")
    fields = decode_message_untrusted(data)
    key = last_bytes(fields, 1)
    kind, payload = last_bytes(fields, 2), last_bytes(fields, 3)
    if not key.startswith(_KEY_PREFIX) or len(key) != len(_KEY_PREFIX) + 32:
        raise RemoteProtocolError("the envelope's key is not Ed25519")
    if kind != PAYLOAD_TYPE:
        raise RemoteProtocolError(f"envelope of type {kind[:16].hex()}")
    public_key = key[len(_KEY_PREFIX) :]
    domain = encode_varint(len(DOMAIN)) + DOMAIN
    signature = last_bytes(fields, 5)
    if not verify(public_key, domain, _signed_part(kind, payload), signature):
        raise IntegrityError("the signature of a peer record does not match")
    record = _decode_record_untrusted(payload)
    if record.peer != peer_id_of(public_key):
        raise IntegrityError("a peer record was signed by another peer")
    return record


def _decode_record_untrusted(payload: bytes) -> PeerRecord:
    fields = decode_message_untrusted(payload)
    peer = id_from_bytes_untrusted(last_bytes(fields, 1))
    infos = all_bytes(fields, 3)[:MAX_ADDRS]
    raws = [last_bytes(decode_message_untrusted(info), 1) for info in infos]
    addrs = decode_multiaddrs_untrusted(raws)
    return PeerRecord(
        peer, last_int(fields, 2), tuple(without_peer(addr, peer) for addr in addrs)
    )


def _signed_part(kind: bytes, payload: bytes) -> bytes:
    """Return what follows the domain in the signed bytes (RFC 0002)."""
    return b"".join(
        (encode_varint(len(kind)), kind, encode_varint(len(payload)), payload)
    )
