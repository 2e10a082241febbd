"""Signed peer records: addresses that a peer vouches for, verifiable by anybody.

    PeerRecord { bytes peer_id = 1; uint64 seq = 2;
                 repeated AddressInfo { bytes multiaddr = 1; } addresses = 3; }

in an envelope (``fabric/core/envelope.py``). Source: libp2p specs, RFC 0003 (routing
records); domain and type as implementations send them (go-libp2p, rust-libp2p,
js-libp2p and py-libp2p agree): "libp2p-peer-record" and the two bytes 03 01.
"""

from __future__ import annotations

from collections.abc import Sequence

import base58
import msgspec

from fabric.core.envelope import EnvelopeKind, open_untrusted, seal
from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import PeerId, public_key_of
from fabric.core.protobuf import (
    all_bytes,
    decode_message_untrusted,
    encode_message,
    last_bytes,
    last_int,
)
from fabric.core.signing import Signer
from nat.multiaddr_bytes import decode_multiaddrs_untrusted, encode_multiaddr

MAX_ADDRS = 16
MAX_ENVELOPE_BYTES = 4096
"""16 circuit addresses have below 2,000 bytes. A point keeps thousands of these."""
PEER_RECORD = EnvelopeKind(b"libp2p-peer-record", b"\x03\x01", MAX_ENVELOPE_BYTES)


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
    return seal(PEER_RECORD, signer, payload)


def open_record_untrusted(data: bytes) -> PeerRecord:
    """Return the record in an envelope whose signature holds.

    Raises:
        RemoteProtocolError: no envelope of a peer record, or out of bounds.
        IntegrityError: the signature or the signer does not match.
    """
    signer, payload = open_untrusted(PEER_RECORD, data)
    record = _decode_record_untrusted(payload)
    if record.peer != signer:
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
