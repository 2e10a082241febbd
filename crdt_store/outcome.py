"""What became of an entry, and what the disk must be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from crdt_store.entry import Entry, Slot


class Outcome(StrEnum):
    """What became of an offered entry."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    OLD = "old"
    HELD = "held"
    """From the future: judged again when due."""
    EQUIVOCATION = "equivocation"
    """Its author signed two entries for one slot and clock; both kept as evidence."""
    MALFORMED = "malformed"
    WRONG_MESH = "wrong_mesh"
    EXPIRED = "expired"
    UNAUTHORISED = "unauthorised"
    REVOKED = "revoked"
    NO_INVITE = "no_invite"
    INVITE_EXPIRED = "invite_expired"
    STALE_REDEMPTION = "stale_redemption"
    BAD_SIGNATURE = "bad_signature"
    FULL = "full"

    @property
    def harmless(self) -> bool:
        """Whether an honest peer offers such entries in the normal course."""
        return self in _HARMLESS


_HARMLESS = frozenset(
    {Outcome.ACCEPTED, Outcome.DUPLICATE, Outcome.OLD, Outcome.HELD, Outcome.EXPIRED}
)


@dataclass(slots=True)
class Changes:
    """What the disk does not hold yet.

    Attributes:
        upserts: New winners by slot.
        deletes: Slots now empty.
        evidence: Conflicting pairs found.
    """

    upserts: dict[Slot, Entry] = field(default_factory=dict)
    deletes: set[Slot] = field(default_factory=set)
    evidence: list[tuple[Entry, Entry]] = field(default_factory=list)
