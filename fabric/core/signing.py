"""Ed25519 signatures, each under a domain tag, and the signed envelope.

A signature made for one purpose must never verify for another, so every signed byte
string starts with one of the tags below. Sign the bytes you send; verify the bytes you
received: msgpack has many encodings of one value, so decode-then-encode is not the
identity and the envelope carries its payload as bytes.
"""

from __future__ import annotations

from typing import Annotated, Protocol

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fabric.core.errors import IntegrityError
from fabric.core.ids import PeerId, peer_id_of, public_key_of

DOMAIN_ENTRY = b"fabric/entry/1\0"
"""Slot entries of the replicated store."""
DOMAIN_JOB_CERTIFICATE = b"fabric/job-certificate/1\0"
"""Job certificates of workers on the data plane."""
DOMAIN_TLS = b"libp2p-tls-handshake:"
"""Identity certificates (libp2p specs, tls/tls.md)."""
DOMAIN_EVIDENCE = b"fabric/evidence/1\0"
"""Software evidence shown to a verifier."""
DOMAIN_ALIVE = b"fabric/alive/1\0"
"""Claims that a peer lives in an incarnation (crdt_store/liveness)."""
DOMAIN_JOB = b"fabric/job/1\0"
"""Specs of jobs, by their submitters (fabric/jobs/submission.py)."""
DOMAIN_ENVELOPE = b"fabric/envelope/1\0"
"""Everything in a :class:`Signed` envelope."""


class Signer(Protocol):
    """Whoever can sign for one identity."""

    @property
    def public_key(self) -> bytes:
        """32-byte raw Ed25519 public key."""
        ...

    @property
    def peer_id(self) -> PeerId:
        """PeerId of :attr:`public_key`."""
        ...

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        """Return the 64-byte signature of ``payload`` under ``domain``."""
        ...


class Ed25519Signer:
    """A :class:`Signer` that holds its 32-byte private key in memory."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self._public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Ed25519Signer:
        """Return a signer with a fresh key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def seed(self) -> bytes:
        """32-byte private seed: for the key file and the libp2p host only."""
        return self._seed

    @property
    def public_key(self) -> bytes:
        """32-byte raw Ed25519 public key."""
        return self._public

    @property
    def peer_id(self) -> PeerId:
        """PeerId of :attr:`public_key`."""
        return peer_id_of(self._public)

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        """Return the 64-byte signature of ``payload`` under ``domain``."""
        return self._key.sign(domain + payload)


def verify(public_key: bytes, domain: bytes, payload: bytes, signature: bytes) -> bool:
    """Return whether ``signature`` is ``public_key``'s over ``payload``."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(signature, domain + payload)
    except (InvalidSignature, ValueError):
        return False
    return True


class Signed(msgspec.Struct, frozen=True, array_like=True):
    """A payload with its type name and its signer's signature over both."""

    signer: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Annotated[str, msgspec.Meta(max_length=64)]
    payload: Annotated[bytes, msgspec.Meta(max_length=65536)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


def _envelope_bytes(kind: str, payload: bytes) -> bytes:
    name = kind.encode()
    return len(name).to_bytes(2, "big") + name + payload


def seal(signer: Signer, kind: str, payload: bytes) -> Signed:
    """Return ``payload`` in an envelope signed by ``signer``."""
    signature = signer.sign(DOMAIN_ENVELOPE, _envelope_bytes(kind, payload))
    return Signed(signer.peer_id, kind, payload, signature)


def open_signed(envelope: Signed, kind: str) -> tuple[PeerId, bytes]:
    """Return (signer, payload) of an envelope of type ``kind``.

    Raises:
        IntegrityError: another kind, or the signature does not match.
        RemoteProtocolError: the signer is not a PeerId.
    """
    key = public_key_of(envelope.signer)
    if envelope.kind != kind:
        raise IntegrityError(f"envelope of kind {envelope.kind!r}, wanted {kind!r}")
    body = _envelope_bytes(kind, envelope.payload)
    if not verify(key, DOMAIN_ENVELOPE, body, envelope.signature):
        raise IntegrityError(f"signature of {envelope.signer} does not match")
    return PeerId(envelope.signer), envelope.payload
