"""What attestation needs from above: Protocols that ``fabric/app/node.py`` fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from attestation.states import State, Tier
from fabric.core.ids import PeerId
from fabric.net.ports import Decision


class Verdict(msgspec.Struct, frozen=True):
    """A result worth keeping: enrolment, change of tier, failure, revocation.

    Routine passes are never verdicts (write budget, DESIGN section 3).
    """

    subject: PeerId
    state: State
    tier: Tier
    reason: str = ""
    evidence_digest: bytes = b""
    """BLAKE3 of the evidence the verdict rests on, or empty."""


class VerdictStore(Protocol):
    """Keeps verdicts; ``crdt_store`` implements it over slots ``t/<subject>/<us>``."""

    def record(self, verdict: Verdict) -> None:
        """Keep our ``verdict`` and spread it; must not block.

        The store adds time and author, and drops a verdict equal to the one it holds.
        """
        ...

    def revocation(self, peer: PeerId) -> str | None:
        """Return why the mesh revoked ``peer``, or None. From memory."""
        ...


class MemoryVerdicts:
    """A :class:`VerdictStore` that forgets at exit: for tests and simulations."""

    def __init__(self) -> None:
        self.recorded: list[Verdict] = []
        self.revoked: dict[PeerId, str] = {}

    def record(self, verdict: Verdict) -> None:
        """Keep ``verdict``."""
        self.recorded.append(verdict)

    def revocation(self, peer: PeerId) -> str | None:
        """Return why ``peer`` is revoked, or None."""
        return self.revoked.get(peer)


Membership = Callable[[PeerId], Decision]
"""Whether the grants we hold make a peer a member; synchronous, from memory."""


@dataclass(frozen=True)
class AdmissionPorts:
    """The store of grants, seen from admission.

    Attributes:
        membership: Whether a peer is a member.
        credential: Our own grant or redemption entries, to show to a verifier.
        ingest_untrusted: Offer entries that came from a peer; invalid ones are ignored
            and counted by the store. Never raises.
        authority_entries: Entries a new member needs to check others' entries, most
            important first.
        verdicts: Where results that matter are kept.
    """

    membership: Membership
    credential: Callable[[], Sequence[bytes]]
    ingest_untrusted: Callable[[Sequence[bytes]], None]
    authority_entries: Callable[[], Sequence[bytes]]
    verdicts: VerdictStore
