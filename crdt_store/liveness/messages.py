"""Wire messages of liveness: RPC method ``store.alive``, both ways the same news.

    Ping ->                 are you there? with target: ask it for me
         <- Ack             yes; with target: whether it answered

A claim of life is signed by its subject, so nobody can keep a ghost alive. A claim of
suspicion or death is hearsay: it starts a suspicion at whoever hears it, never a death,
and the subject refutes it with a higher incarnation.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import digest
from fabric.core.ids import MeshId, PeerId, public_key_of
from fabric.core.signing import DOMAIN_ALIVE, Signer, verify

METHOD = "store.alive"
MAX_CLAIMS = 6
"""News in one message: about 1 KiB."""
MAX_INTRODUCED = 128
"""Absent members named to a newcomer; it finds the rest by probing."""
MAX_REPORTS = 4
"""Loads of others in one message."""
MAX_INCARNATION = 2**53 - 1
MAX_MARK = 2**31 - 2
NOBODY = PeerId("")

Peer = Annotated[PeerId, msgspec.Meta(min_length=1, max_length=64)]
Incarnation = Annotated[int, msgspec.Meta(ge=0, le=MAX_INCARNATION)]
Small = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Standing(IntEnum):
    """What a claim says of its subject."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy a peer is, as it says.

    Attributes:
        queued: Requests and jobs that wait there.
        running: Jobs it takes part in.
    """

    queued: Small = 0
    running: Small = 0


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What ``accuser`` says of ``subject`` in that incarnation; life is signed."""

    subject: Peer
    incarnation: Incarnation
    standing: Standing
    accuser: Annotated[PeerId, msgspec.Meta(max_length=64)] = NOBODY
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """The load of a peer that the sender heard ``age_ms`` ago."""

    peer: Peer
    age_ms: Small
    load: Load


Claims = Annotated[tuple[Claim, ...], msgspec.Meta(max_length=MAX_INTRODUCED)]
Reports = Annotated[tuple[Report, ...], msgspec.Meta(max_length=MAX_REPORTS)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Are you there?

    Attributes:
        incarnation: The sender's.
        load: The sender's.
        target: Probe this member for the sender, or empty.
        intro: The sender is new here, or differs: name everybody who is absent.
        absences: A hash of whom the sender takes for dead; 0: none is compared.
    """

    incarnation: Incarnation
    claims: Claims = ()
    load: Load = Load()
    reports: Reports = ()
    target: Annotated[PeerId, msgspec.Meta(max_length=64)] = NOBODY
    intro: bool = False
    absences: Small = 0


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """I am; ``reached`` is False when the target did not answer me."""

    incarnation: Incarnation
    claims: Claims = ()
    load: Load = Load()
    reports: Reports = ()
    reached: bool = True
    absences: Small = 0


CODEC: Codec[Ping | Ack] = Codec(Ping | Ack, max_bytes=32 << 10)


def decode_untrusted(data: bytes) -> Ping | Ack:
    """Return the message a peer sent: the one door of this package.

    Raises:
        RemoteProtocolError: oversized or malformed.
    """
    return CODEC.decode_untrusted(data)


def _vow(mesh: MeshId, peer: PeerId, incarnation: int) -> bytes:
    return digest(f"{mesh}/{peer}/{incarnation}".encode())


def sign_alive(signer: Signer, mesh: MeshId, incarnation: int) -> bytes:
    """Return the signature of a claim that the signer lives in ``incarnation``."""
    return signer.sign(DOMAIN_ALIVE, _vow(mesh, signer.peer_id, incarnation))


def check_alive(mesh: MeshId, peer: PeerId, incarnation: int, signature: bytes) -> bool:
    """Return whether ``peer`` signed that it lives in ``incarnation``.

    ``peer`` must be a PeerId: the core asks about members only.
    """
    vow = _vow(mesh, peer, incarnation)
    return verify(public_key_of(peer), DOMAIN_ALIVE, vow, signature)
