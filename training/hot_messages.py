"""What daemons say to each other about states kept in memory.

RPC ``hot.ask`` takes a :class:`HotAsk` and answers :class:`HotHeld`; ``hot.keep`` takes
a :class:`HotKeep`, pulls the state and answers :class:`HotKept`.

Bulk service ``hot``: fixed requests of 36 bytes (state name, block number, big-endian),
answered in order with a 4-byte length and that many bytes; 0 says that it is not here.
Block ``LIST_BLOCK`` is the list of the block digests, whose own digest is the name.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.errors import IntegrityError
from fabric.core.ids import PeerId
from fabric.core.signing import Signed, Signer, open_signed, seal
from fabric.jobs.messages import Count, Job, Reason

METHOD_ASK = "hot.ask"
METHOD_KEEP = "hot.keep"
BULK_SERVICE = "hot"
KIND_CLAIM = "training.hot"
"""Envelope kind of a signed :class:`HotClaim`."""

REQUEST = struct.Struct(">32sI")
LENGTH = struct.Struct(">I")
LIST_BLOCK = 0xFFFFFFFF
MAX_GENERATIONS = 2
"""States kept of one job: the newest, and the one before it while it is written."""

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class HotClaim(msgspec.Struct, frozen=True):
    """A participant of ``job`` held this start state of ``round``."""

    job: Job
    round: Count
    digest: Digest
    size: Count


class HotAsk(msgspec.Struct, frozen=True, tag="ask"):
    """Which states of ``job`` do you keep?"""

    job: Job


class HotHeld(msgspec.Struct, frozen=True, tag="held"):
    """Signed claims of the kept states; ``works``: a worker here holds one too."""

    claims: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_GENERATIONS)]
    works: bool = False


class HotKeep(msgspec.Struct, frozen=True, tag="keep"):
    """Keep the state that the sender holds and claims; the buddy's part."""

    claim: Signed


class HotKept(msgspec.Struct, frozen=True, tag="kept"):
    """It is kept, or ``refused`` says why not."""

    refused: Reason = ""


Message = HotAsk | HotHeld | HotKeep | HotKept
CODEC: Codec[Message] = Codec(Message, max_bytes=1 << 16)
CLAIM: Codec[HotClaim] = Codec(HotClaim, max_bytes=1024)
ENVELOPE: Codec[Signed] = Codec(Signed, max_bytes=4096)


def sign_claim(signer: Signer, claim: HotClaim) -> Signed:
    """Return ``claim`` signed by a participant that holds the state."""
    return seal(signer, KIND_CLAIM, CLAIM.encode(claim))


def open_claim_untrusted(envelope: Signed) -> tuple[PeerId, HotClaim]:
    """Return who claims what.

    Raises:
        IntegrityError: the signature does not match.
        RemoteProtocolError: the claim is malformed.
    """
    signer, payload = open_signed(envelope, KIND_CLAIM)
    return signer, CLAIM.decode_untrusted(payload)


def check_about(claim: HotClaim, job: str) -> None:
    """Raise IntegrityError unless ``claim`` is about ``job``."""
    if claim.job != job:
        raise IntegrityError(f"a claim about {claim.job[:8]}, asked about {job[:8]}")
