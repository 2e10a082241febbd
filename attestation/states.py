"""Admission states of a peer, as this node sees it.

Rule 1: transitions are data. ``TRANSITIONS[state][event]`` is the next state; a missing
event is a bug of ours (:class:`LocalProtocolError`).
Rule 2: silence is not guilt. ``UNREACHABLE``, ``MISSED`` and ``EXPIRED`` never lead to
``QUARANTINED`` or ``REVOKED``: a peer that cannot be reached is never called failed.
Rule 3: only a new enrolment leaves ``REVOKED``.

    UNKNOWN --challenged--> CHALLENGED --accepted--> TRUSTED --missed--> SUSPECT
       ^                        |                      ^  |                 |
       |                     rejected               accepted               |
       |                        v                      |  v                 |
       |<--enrolled------- QUARANTINED <---------- rejected <---------------|
       |<-----------------------------------------------------expired-------'
       '<--enrolled-- REVOKED <--revoked-- (every state)

Source: RFC 9334 (RATS) for the roles; Keylime for the distinction of a broken evidence
chain and a policy violation.
"""

from __future__ import annotations

from enum import Enum, IntEnum

import msgspec

from fabric.core.errors import LocalProtocolError


class Tier(IntEnum):
    """How strong the evidence behind a standing is; higher is stronger."""

    SELF = 0
    """The peer's key only."""
    SOFTWARE = 1
    """A signed measurement of installed files, as honest as the host that made it."""
    GROUP_TPM = 2
    """A (virtual) TPM whose endorsement key the group enrolled."""
    TPM = 3
    """A hardware TPM with a vendor's endorsement root and kernel measurements."""
    TEE = 4
    """A trusted execution environment."""

    @property
    def label(self) -> str:
        """Name for people: "software"."""
        return self.name.lower().replace("_", "-")


class State(Enum):
    """Where a peer stands."""

    UNKNOWN = "unknown"
    CHALLENGED = "challenged"
    TRUSTED = "trusted"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"


class Event(Enum):
    """What happened to a peer."""

    CHALLENGED = "challenged"
    """We sent it a nonce."""
    ACCEPTED = "accepted"
    """Its evidence passed."""
    REJECTED = "rejected"
    """It answered, and its evidence is broken or against policy."""
    UNREACHABLE = "unreachable"
    """It did not answer: connection lost, or too slow."""
    MISSED = "missed"
    """No fresh evidence for one interval."""
    EXPIRED = "expired"
    """No fresh evidence for the lifetime of the result."""
    REVOKED = "revoked"
    """The mesh revoked it."""
    ENROLLED = "enrolled"
    """An admin enrolled it again."""


_S, _E = State, Event
TRANSITIONS: dict[State, dict[Event, State]] = {
    _S.UNKNOWN: {
        _E.CHALLENGED: _S.CHALLENGED,
        _E.UNREACHABLE: _S.UNKNOWN,
        _E.MISSED: _S.UNKNOWN,
        _E.EXPIRED: _S.UNKNOWN,
        _E.REVOKED: _S.REVOKED,
        _E.ENROLLED: _S.UNKNOWN,
    },
    _S.CHALLENGED: {
        _E.CHALLENGED: _S.CHALLENGED,
        _E.ACCEPTED: _S.TRUSTED,
        _E.REJECTED: _S.QUARANTINED,
        _E.UNREACHABLE: _S.UNKNOWN,
        _E.MISSED: _S.UNKNOWN,
        _E.EXPIRED: _S.UNKNOWN,
        _E.REVOKED: _S.REVOKED,
        _E.ENROLLED: _S.CHALLENGED,
    },
    _S.TRUSTED: {
        _E.CHALLENGED: _S.TRUSTED,
        _E.ACCEPTED: _S.TRUSTED,
        _E.REJECTED: _S.QUARANTINED,
        _E.UNREACHABLE: _S.TRUSTED,
        _E.MISSED: _S.SUSPECT,
        _E.EXPIRED: _S.UNKNOWN,
        _E.REVOKED: _S.REVOKED,
        _E.ENROLLED: _S.TRUSTED,
    },
    _S.SUSPECT: {
        _E.CHALLENGED: _S.SUSPECT,
        _E.ACCEPTED: _S.TRUSTED,
        _E.REJECTED: _S.QUARANTINED,
        _E.UNREACHABLE: _S.SUSPECT,
        _E.MISSED: _S.SUSPECT,
        _E.EXPIRED: _S.UNKNOWN,
        _E.REVOKED: _S.REVOKED,
        _E.ENROLLED: _S.SUSPECT,
    },
    _S.QUARANTINED: {
        _E.CHALLENGED: _S.QUARANTINED,
        _E.ACCEPTED: _S.TRUSTED,
        _E.REJECTED: _S.QUARANTINED,
        _E.UNREACHABLE: _S.QUARANTINED,
        _E.MISSED: _S.QUARANTINED,
        _E.EXPIRED: _S.QUARANTINED,
        _E.REVOKED: _S.REVOKED,
        _E.ENROLLED: _S.UNKNOWN,
    },
    # Every event but ENROLLED stays: an exchange begun before the revocation may end
    # after it, and its result must not lift the revocation.
    _S.REVOKED: dict.fromkeys(_E, _S.REVOKED) | {_E.ENROLLED: _S.UNKNOWN},
}


def advance(state: State, event: Event) -> State:
    """Return the state after ``event``.

    Raises:
        LocalProtocolError: the event cannot happen in ``state``.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise LocalProtocolError(
            f"admission event {event.value} in state {state.value}"
        ) from None


class Standing(msgspec.Struct, frozen=True):
    """Where one peer stands and until when.

    Attributes:
        state: Its state.
        tier: Strength of the last accepted evidence.
        fresh_until: Monotonic seconds after which a trusted peer is suspect.
        until: Monotonic seconds after which it is unknown again.
        reason: Why, for a person.
    """

    state: State = State.UNKNOWN
    tier: Tier = Tier.SELF
    fresh_until: float = 0.0
    until: float = 0.0
    reason: str = "not seen yet"


UNKNOWN = Standing()
