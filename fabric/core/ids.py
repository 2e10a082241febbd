"""Identifiers. Each is a distinct type, so mypy catches a JobId passed as a PeerId.

A libp2p PeerId of an Ed25519 key is the *identity* multihash of the protobuf-encoded
public key, in base58: the key can be read back from the id.

Source: libp2p specs, peer-ids/peer-ids.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NewType

import base58

from fabric.core.errors import RemoteProtocolError

PeerId = NewType("PeerId", str)
"""Base58 libp2p PeerId of an Ed25519 public key, "12D3KooW..." (52 characters)."""

MeshId = NewType("MeshId", str)
"""Hex BLAKE3 of the mesh's root public key and name."""

JobId = NewType("JobId", str)
"""Hex BLAKE3 of the encoded job spec (64 characters)."""

BlobId = NewType("BlobId", str)
"""Hex BLAKE3 root of a piece of content (64 characters)."""

MAX_PEER_ID_CHARS = 64
"""Longest PeerId text we parse; Ed25519 ids have 52 characters."""

# identity multihash of 36 bytes; protobuf {1: KeyType.Ed25519, 2: 32 bytes}
_PREFIX = b"\x00\x24\x08\x01\x12\x20"


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the PeerId of a 32-byte raw Ed25519 ``public_key``."""
    if len(public_key) != 32:
        raise ValueError(f"Ed25519 public key of {len(public_key)} B, not 32")
    return PeerId(base58.b58encode(_PREFIX + public_key).decode())


@lru_cache(maxsize=8192)
def public_key_of(peer: str) -> bytes:
    """Return the 32-byte raw Ed25519 public key inside ``peer`` (cached: 45 us).

    Raises:
        RemoteProtocolError: not the PeerId of an Ed25519 key.
    """
    if len(peer) > MAX_PEER_ID_CHARS:
        raise RemoteProtocolError(f"peer id of {len(peer)} characters")
    try:
        raw = bytes(base58.b58decode(peer))
    except ValueError as exc:
        raise RemoteProtocolError(f"peer id is not base58: {exc}") from exc
    if len(raw) != len(_PREFIX) + 32 or not raw.startswith(_PREFIX):
        raise RemoteProtocolError("peer id does not hold an Ed25519 key")
    return raw[len(_PREFIX) :]


def short(peer: str) -> str:
    """Return the last eight characters: the form for logs and tables."""
    return peer[-8:]
