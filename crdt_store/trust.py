"""Who is in a mesh, by whose word, and which invites are open: for people. Pure."""

from __future__ import annotations

from crdt_store.authority import Authority
from crdt_store.grants import (
    GRANT_PREFIX,
    INVITE_PREFIX,
    REDEMPTION_PREFIX,
    REVOCATION_PREFIX,
    AuthorityRecord,
    Grant,
    InviteTerms,
    Redemption,
    Revocation,
    parse_record_untrusted,
)
from crdt_store.slots import Slots
from crdt_store.trust_row import TrustRow


def trust_rows(slots: Slots, authority: Authority, now: float) -> list[TrustRow]:
    """Return members first, then invites, each by time.

    Args:
        slots: What a replica holds.
        authority: Of the same replica.
        now: Wall seconds.
    """
    members = [
        _member(record, authority, now)
        for record in _records(slots, GRANT_PREFIX, REDEMPTION_PREFIX)
    ]
    revoked = {
        record.subject: record.record
        for record in _records(slots, REVOCATION_PREFIX)
        if isinstance(record.record, Revocation) and not record.record.lifted
    }
    invites = [
        _invite(record, authority, revoked.get(record.subject), now)
        for record in _records(slots, INVITE_PREFIX)
    ]
    found = [*members, *invites]
    return sorted(found, key=lambda row: (row.kind == "invite", row.since, row.subject))


def _records(slots: Slots, *prefixes: str) -> list[AuthorityRecord]:
    entries = [entry for prefix in prefixes for entry in slots.under(prefix)]
    return [parse_record_untrusted(entry) for entry in entries]  # held: it parses


def _member(record: AuthorityRecord, authority: Authority, now: float) -> TrustRow:
    decision = authority.membership(record.subject, now)
    grant = record.record
    if isinstance(grant, Grant):
        role: str = grant.role
    else:
        assert isinstance(grant, Redemption)
        role = str(authority.role_of(record.subject, now) or "")
    ends = isinstance(grant, Grant) and grant.not_after > 0
    return TrustRow(
        kind="grant" if isinstance(grant, Grant) else "invited",
        subject=record.subject,
        role=role,
        by=record.entry.peer,
        since=record.entry.seconds,
        until=float(grant.not_after) if isinstance(grant, Grant) and ends else None,
        code="" if decision.allowed else decision.code,
        reason="" if decision.allowed else decision.reason,
    )


def _invite(
    record: AuthorityRecord,
    authority: Authority,
    revoked: Revocation | None,
    now: float,
) -> TrustRow:
    terms = record.record
    assert isinstance(terms, InviteTerms)
    used = len(authority.joiners(record.subject))
    code, reason = "", ""
    if revoked is not None:
        code, reason = "E_REVOKED", revoked.reason or "revoked"
    elif used >= terms.uses:
        code, reason = "E_INVITE_EXHAUSTED", "no uses left"
    elif terms.expiry <= now:
        code, reason = "E_INVITE_EXPIRED", "expired"
    return TrustRow(
        kind="invite",
        subject=record.subject,
        role=terms.role,
        by=record.entry.peer,
        since=record.entry.seconds,
        until=float(terms.expiry),
        uses=terms.uses,
        used=min(used, terms.uses),
        code=code,
        reason=reason,
    )
