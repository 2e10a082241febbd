"""Wire messages of ``/fabric/attest/1``: one exchange per stream.

    joiner                              verifier
      Hello(mesh, credential) ------->
                              <------- Challenge(nonce)  or Refused
      Proof(evidence, nonce)  ------->
                              <------- Admitted(..., evidence)  or Refused

Each message is one frame: 4-byte big-endian length, then MessagePack.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from attestation.software import MAX_EVIDENCE_BYTES
from attestation.states import Tier
from fabric.core.codec import Codec

NONCE_BYTES = 32
MAX_ENTRY_BYTES = 6144
"""A slot entry: value <= 4 KiB, signature, names."""
MAX_CREDENTIAL_ENTRIES = 16
"""A redemption and the chain of grants behind it."""
MAX_AUTHORITY_ENTRIES = 2048
MAX_AUTHORITY_BYTES = 512 << 10
"""Enough for some thousand grants; reconciliation brings the rest."""
MAX_INBOUND_BYTES = 128 << 10
"""Largest message a verifier reads: a Hello with a full credential."""
MAX_MESSAGE_BYTES = MAX_AUTHORITY_BYTES + (64 << 10)
"""Largest message a joiner reads: Admitted."""

Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Entry = Annotated[bytes, msgspec.Meta(max_length=MAX_ENTRY_BYTES)]
Evidence = Annotated[bytes, msgspec.Meta(max_length=MAX_EVIDENCE_BYTES)]
Text = Annotated[str, msgspec.Meta(max_length=500)]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Ask to be admitted to ``mesh`` and show by what right."""

    mesh: Annotated[str, msgspec.Meta(max_length=64)]
    credential: Annotated[
        tuple[Entry, ...], msgspec.Meta(max_length=MAX_CREDENTIAL_ENTRIES)
    ] = ()


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """Membership holds; show evidence over ``nonce``."""

    nonce: Nonce


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    """The joiner's evidence, and the joiner's challenge to the verifier."""

    evidence: Evidence
    nonce: Nonce


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """The verifier accepted the joiner and proves itself in turn."""

    tier: Tier
    valid_seconds: Annotated[float, msgspec.Meta(ge=0, le=604800)]
    evidence: Evidence
    authority: Annotated[
        tuple[Entry, ...], msgspec.Meta(max_length=MAX_AUTHORITY_ENTRIES)
    ] = ()


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The verifier says no, why, and what the joiner can do."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Text
    next_step: Text = ""
    retry_after_seconds: Annotated[float, msgspec.Meta(ge=0, le=604800)] = 0.0


Message = Hello | Challenge | Proof | Admitted | Refused

CODEC: Codec[Message] = Codec(Message, max_bytes=MAX_MESSAGE_BYTES)
