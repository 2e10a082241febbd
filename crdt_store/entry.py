"""Entry: one signed value in one slot, and its wire form.

    raw = signature (64 B) || body,  body = msgpack [mesh, author, key, hlc, ttl, value]

The signature covers the body's bytes as sent, under DOMAIN_ENTRY; the id is the BLAKE3
of ``raw``. Nothing is ever decoded and encoded again on the way: msgpack has many
encodings of one value.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

import msgspec

from crdt_store.clock import wall_seconds
from fabric.core.codec import Codec
from fabric.core.digest import digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import MeshId, PeerId, peer_id_of
from fabric.core.signing import DOMAIN_ENTRY, Signer, verify

MAX_KEY_CHARS = 200
MAX_VALUE_BYTES = 4096
"""Larger payloads are content: the slot holds their root."""
MAX_TTL_SECONDS = 10 * 366 * 86400
FADE_SECONDS = 60.0
"""Longest time before its expiry at which an entry leaves the fingerprints."""
_SIGNATURE_BYTES = 64
MAX_ENTRY_BYTES = _SIGNATURE_BYTES + MAX_VALUE_BYTES + 4 * MAX_KEY_CHARS + 128
"""Signature, value, key in UTF-8, and 128 B for the other fields with headers."""

Hash32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Slot = tuple[str, bytes]
"""(key, author public key): each slot has one writer."""


class _Body(msgspec.Struct, frozen=True, array_like=True):
    mesh: Hash32
    author: Hash32
    key: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY_CHARS)]
    hlc: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
    ttl_seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_TTL_SECONDS)]
    value: Annotated[bytes, msgspec.Meta(max_length=MAX_VALUE_BYTES)]


_BODY: Codec[_Body] = Codec(_Body, max_bytes=MAX_ENTRY_BYTES)


@lru_cache(maxsize=4096)
def author_peer(public_key: bytes) -> PeerId:
    """Return the PeerId of ``public_key`` (cached: base58 is slow)."""
    return peer_id_of(public_key)


class Entry(msgspec.Struct, frozen=True, gc=False):  # there may be 200,000
    """A decoded entry beside the bytes it came from.

    Attributes:
        mesh: Namespace: an entry of one mesh is void in every other.
        author: 32-byte Ed25519 public key of the writer.
        key: Slash-separated path; the first segment names the table.
        hlc: Hybrid time, milliseconds << 16 | counter.
        ttl_seconds: Lifetime from the hybrid time on; 0 = for ever.
        value: At most 4 KiB.
        raw: The bytes signed and sent.
        id: BLAKE3 of ``raw``.
        slot: (key, author): where the entry lives.
    """

    mesh: MeshId
    author: bytes
    key: str
    hlc: int
    ttl_seconds: int
    value: bytes
    raw: bytes
    id: bytes
    slot: Slot

    @property
    def peer(self) -> PeerId:
        """The author's PeerId."""
        return author_peer(self.author)

    @property
    def order(self) -> tuple[int, bytes]:
        """The greatest in a slot wins: a total order, the same on every replica."""
        return self.hlc, self.id

    @property
    def seconds(self) -> float:
        """Wall seconds at which the author says it was written."""
        return wall_seconds(self.hlc)

    @property
    def expires_at(self) -> float:
        """Wall seconds from which the entry is void; infinite without a ttl."""
        return self.seconds + self.ttl_seconds if self.ttl_seconds else math.inf

    @property
    def fades_at(self) -> float:
        """Wall seconds from which the entry is no longer offered to others.

        Clocks differ: without this margin the replica whose clock is ahead would be
        offered an expired entry again and again by the one behind.
        """
        return self.expires_at - min(FADE_SECONDS, self.ttl_seconds / 4)

    def signature_matches(self) -> bool:
        """Return whether the author signed these bytes."""
        signature, body = self.raw[:_SIGNATURE_BYTES], self.raw[_SIGNATURE_BYTES:]
        return verify(self.author, DOMAIN_ENTRY, body, signature)


@lru_cache(maxsize=16)
def _mesh_id(mesh: bytes) -> MeshId:
    return MeshId(mesh.hex())


@lru_cache(maxsize=4096)
def _shared(author: bytes) -> bytes:
    """Return the one object kept for ``author``: every entry of it shares that."""
    return author


def _entry(raw: bytes, body: _Body) -> Entry:
    author = _shared(body.author)
    return Entry(
        mesh=_mesh_id(body.mesh),
        author=author,
        key=body.key,
        hlc=body.hlc,
        ttl_seconds=body.ttl_seconds,
        value=body.value,
        raw=raw,
        id=digest(raw),
        slot=(body.key, author),
    )


def sign_entry(
    signer: Signer, mesh: MeshId, key: str, hlc: int, ttl_seconds: int, value: bytes
) -> Entry:
    """Return a new entry of ``signer``.

    Raises:
        ValueError: the key or value is out of bounds.
    """
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise ValueError(f"key of {len(key)} characters, not 1..{MAX_KEY_CHARS}")
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"value of {len(value)} B > {MAX_VALUE_BYTES} B")
    if not 0 <= ttl_seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"ttl of {ttl_seconds} s, not 0..{MAX_TTL_SECONDS}")
    mesh_bytes = bytes.fromhex(mesh)
    body = _Body(mesh_bytes, signer.public_key, key, hlc, ttl_seconds, value)
    encoded = _BODY.encode(body)
    return _entry(signer.sign(DOMAIN_ENTRY, encoded) + encoded, body)


def decode_entry_untrusted(raw: bytes) -> Entry:
    """Return the entry in ``raw``; its signature is *not* checked here.

    Raises:
        RemoteProtocolError: oversized or malformed.
    """
    if not _SIGNATURE_BYTES < len(raw) <= MAX_ENTRY_BYTES:
        raise RemoteProtocolError(f"entry of {len(raw)} B")
    return _entry(raw, _BODY.decode_untrusted(raw[_SIGNATURE_BYTES:]))
