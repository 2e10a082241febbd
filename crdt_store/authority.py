r"""Who may write what: a pure function of the authority entries held.

Authority flows strictly downwards (root > owner > admin > the rest), so whether a
record is valid depends only on records of higher rank and there are no cycles:

    root --grant--> owner --grant--> admin --invite K--> K --redemption--> member
     |                \__________________ revocation ______________________/
     succession--> new root

A *source* is why a peer is a member: a valid grant, or a redemption among the first
``uses`` of its invite by (hlc, id). Validity of an entry is judged at the entry's own
time, never at the reader's, so all replicas that hold the same records agree.

Redemptions beyond ``uses`` stay stored (all replicas must rank the same set); their
joiners simply have no authority, and a reason.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from crdt_store.entry import Entry, Slot
from crdt_store.grants import (
    AuthorityRecord,
    Grant,
    InviteTerms,
    Mesh,
    Redemption,
    Revocation,
    Succession,
    is_authority_key,
    parse_record_untrusted,
)
from crdt_store.roles import INVITABLE, RANK, ROOT_RANK, Role, may_write
from crdt_store.roots import Roots
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId, peer_id_of, short
from fabric.net.ports import ALLOWED, Decision

_MAX_REMEMBERED_REFUSALS = 256

_Index = dict[str, dict[Slot, AuthorityRecord]]

Refusal = str
"""Why an entry is not valid, as a stable word; empty when it is valid."""


@dataclass(frozen=True, slots=True)
class _Source:
    role: Role
    grant: Grant | None

    def covers(self, seconds: float) -> bool:
        if self.grant is None:
            return True
        end = self.grant.not_after
        return self.grant.not_before <= seconds and (end == 0 or seconds <= end)

    def permits(self, writer: PeerId, key: str) -> bool:
        prefixes = self.grant.prefixes if self.grant is not None else ()
        if prefixes and not key.startswith(prefixes):
            return False
        return may_write(self.role, writer, key)


@dataclass(frozen=True, slots=True)
class _Profile:
    """What the records say about one peer, greatest rank first."""

    sources: tuple[_Source, ...]
    revocations: tuple[AuthorityRecord, ...]

    @property
    def rank(self) -> int:
        return max((RANK[source.role] for source in self.sources), default=1)


class Authority:
    """Judges entries and peers of one mesh.

    ``add`` only what ``refusal`` found valid; after a removal or replacement re-judge
    what is held (:class:`crdt_store.replica.Replica` does).
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._roots = Roots(peer_id_of(mesh.root))
        self._records: dict[Slot, AuthorityRecord] = {}
        self._grants: _Index = defaultdict(dict)
        self._invites: _Index = defaultdict(dict)
        self._revocations: _Index = defaultdict(dict)
        self._redemptions: _Index = defaultdict(dict)
        self._invited: dict[PeerId, set[str]] = defaultdict(set)
        self._profiles: dict[PeerId, _Profile] = {}
        self._refused: dict[PeerId, Refusal] = {}

    @property
    def root(self) -> PeerId:
        """The present root key."""
        return self._roots.present

    # --- judging entries

    def refusal(self, entry: Entry) -> Refusal:
        """Return "" if ``entry`` is valid by the records held, else why not.

        The signature is not looked at.
        """
        if not is_authority_key(entry.key):
            return self._data_refusal(entry)
        try:
            record = parse_record_untrusted(entry)
        except RemoteProtocolError:
            return "malformed"
        refusal = self._record_refusal(record)
        if isinstance(record.record, Redemption):
            self._remember(record.subject, refusal)
        return refusal

    def _data_refusal(self, entry: Entry) -> Refusal:
        writer = entry.peer
        profile = self._profile(writer)
        if self._voided(profile, entry):
            return "revoked"
        seconds = entry.seconds
        for source in profile.sources:
            if source.covers(seconds) and source.permits(writer, entry.key):
                return ""
        return "unauthorised"

    def _record_refusal(self, record: AuthorityRecord) -> Refusal:
        signer, value = record.entry.peer, record.record
        if isinstance(value, Redemption):
            return self._redemption_refusal(record)
        if isinstance(value, InviteTerms) and value.role not in INVITABLE:
            return "malformed"
        if self._roots.signed(record.entry):
            return ""
        if isinstance(value, Succession):
            return "unauthorised"
        profile = self._profile(signer)
        if self._voided(profile, record.entry):
            return "revoked"
        delegating = isinstance(value, Grant)
        rank = self._rank_at(signer, record.entry.seconds, delegating=delegating)
        return "" if rank >= self._rank_needed(record) else "unauthorised"

    def _rank_needed(self, record: AuthorityRecord) -> int:
        match record.record:
            case Grant(role=role):
                return RANK[role] + 1
            case Revocation():
                return max(self._profile(record.subject).rank + 1, RANK[Role.ADMIN])
            case InviteTerms() | Redemption():
                return RANK[Role.ADMIN]
            case Succession():
                return ROOT_RANK + 1  # only the root itself

    def _redemption_refusal(self, record: AuthorityRecord) -> Refusal:
        if record.entry.peer != record.invite_key:
            return "unauthorised"
        terms = self._terms(record.invite_key)
        if terms is None:
            return "no_invite"
        if record.entry.seconds > terms.expiry:
            return "invite_expired"
        key_profile = self._profile(PeerId(record.invite_key))
        return "revoked" if self._voided(key_profile, record.entry) else ""

    def _rank_at(self, peer: PeerId, seconds: float, *, delegating: bool) -> int:
        ranks = [
            RANK[source.role]
            for source in self._profile(peer).sources
            if source.covers(seconds)
            and (not delegating or (source.grant and source.grant.may_delegate))
        ]
        return max(ranks, default=0)

    @staticmethod
    def _voided(profile: _Profile, entry: Entry) -> bool:
        return any(
            isinstance(item.record, Revocation) and item.record.voids(entry)
            for item in profile.revocations
        )

    # --- the records

    def add(self, entry: Entry) -> None:
        """Take in a valid authority entry; it replaces an older one of its slot."""
        record = parse_record_untrusted(entry)
        self._records[entry.slot] = record
        if isinstance(record.record, Succession):
            self._roots.add(record)
            self._profiles.clear()
            return
        index, about = self._index(record)
        index[about][entry.slot] = record
        if isinstance(record.record, Redemption):
            self._invited[record.subject].add(record.invite_key)
        self._forget_profiles(record)

    def remove(self, slot: Slot) -> None:
        """Forget the record in ``slot``."""
        record = self._records.pop(slot)
        if isinstance(record.record, Succession):
            self._roots.remove(record)
            self._profiles.clear()
            return
        index, about = self._index(record)
        del index[about][slot]
        if not index[about]:
            del index[about]
        if isinstance(record.record, Redemption):
            self._invited[record.subject].discard(record.invite_key)
        self._forget_profiles(record)

    def _index(self, record: AuthorityRecord) -> tuple[_Index, str]:
        match record.record:
            case Grant():
                return self._grants, record.subject
            case InviteTerms():
                return self._invites, record.subject
            case Revocation():
                return self._revocations, record.subject
            case Redemption():
                return self._redemptions, record.invite_key
            case Succession():
                raise AssertionError("successions are in _roots")

    def _forget_profiles(self, record: AuthorityRecord) -> None:
        if isinstance(record.record, Redemption):
            for joiner in self.joiners(record.invite_key):
                self._profiles.pop(joiner, None)
            self._profiles.pop(record.subject, None)  # its record was just removed
        else:
            self._profiles.clear()

    def revocations_of(self, peer: str) -> list[Entry]:
        """Return the entries that revoke ``peer``."""
        return [record.entry for record in self._revocations.get(peer, {}).values()]

    def joiners(self, invite_key: str) -> list[PeerId]:
        """Return who redeemed ``invite_key``, in the order in which uses count."""
        records = self._redemptions.get(invite_key, {}).values()
        return [r.subject for r in sorted(records, key=lambda r: r.entry.order)]

    def overdrawn(self, invite_key: str) -> bool:
        """Return whether ``invite_key`` has more redemptions than uses."""
        terms = self._terms(invite_key)
        used = len(self._redemptions.get(invite_key, {}))
        return terms is None or used > terms.uses

    def _terms(self, invite_key: str) -> InviteTerms | None:
        records = self._invites.get(invite_key, {}).values()
        best = max(records, key=lambda r: r.entry.order, default=None)
        if best is None or not isinstance(best.record, InviteTerms):
            return None
        return best.record

    def _profile(self, peer: PeerId) -> _Profile:
        cached = self._profiles.get(peer)
        if cached is None:
            cached = self._build_profile(peer)
            if cached.sources or cached.revocations:  # strangers are without number
                self._profiles[peer] = cached
        return cached

    def _build_profile(self, peer: PeerId) -> _Profile:
        sources = [
            _Source(record.record.role, record.record)
            for record in self._grants.get(peer, {}).values()
            if isinstance(record.record, Grant)
        ]
        for invite_key in self._invited.get(peer, ()):
            terms = self._terms(invite_key)
            if terms and peer in self.joiners(invite_key)[: terms.uses]:
                sources.append(_Source(terms.role, None))
        sources.sort(key=lambda s: (-RANK[s.role], s.role))
        return _Profile(tuple(sources), tuple(self._revocations.get(peer, {}).values()))

    def _remember(self, joiner: PeerId, refusal: Refusal) -> None:
        self._refused.pop(joiner, None)
        if refusal:
            while len(self._refused) >= _MAX_REMEMBERED_REFUSALS:
                self._refused.pop(next(iter(self._refused)))
            self._refused[joiner] = refusal

    # --- judging peers

    def role_of(self, peer: PeerId, now: float) -> Role | None:
        """Return the highest role ``peer`` has at ``now`` (wall seconds)."""
        if not self.membership(peer, now).allowed:
            return None
        covering = (s.role for s in self._profile(peer).sources if s.covers(now))
        return next(covering, None)

    def members(self, now: float) -> frozenset[PeerId]:
        """Return every member at ``now``."""
        known = {*self._grants, *self._invited}
        return frozenset(
            PeerId(peer) for peer in known if self.membership(PeerId(peer), now).allowed
        )

    def membership(self, peer: PeerId, now: float) -> Decision:
        """Return whether ``peer`` is a member at ``now``, or why not and what to do."""
        profile = self._profile(peer)
        for item in profile.revocations:
            if isinstance(item.record, Revocation) and not item.record.lifted:
                return _revoked(peer, item.record.reason)
        if any(source.covers(now) for source in profile.sources):
            return ALLOWED
        if profile.sources:
            return Decision(
                allowed=False,
                code="E_NOT_MEMBER",
                reason=f"the grant of {short(peer)} does not cover the present time",
                next_step="ask an owner for a new grant, and check this clock",
            )
        return self._why_not_invited(peer)

    def _why_not_invited(self, peer: PeerId) -> Decision:
        if self._invited.get(peer):
            return _refused(
                "E_INVITE_EXHAUSTED",
                f"the invite {short(peer)} used has no uses left",
            )
        if self._refused.get(peer) == "invite_expired":
            return _refused(
                "E_INVITE_EXPIRED", f"the invite {short(peer)} used has expired"
            )
        return _refused("E_NOT_MEMBER", f"{short(peer)} is no member of this mesh")


def _refused(code: str, reason: str) -> Decision:
    step = "ask an owner or admin for an invite: fabric invite"
    return Decision(allowed=False, code=code, reason=reason, next_step=step)


def _revoked(peer: PeerId, reason: str) -> Decision:
    return Decision(
        allowed=False,
        code="E_REVOKED",
        reason=f"{short(peer)} was revoked" + (f": {reason}" if reason else ""),
        next_step="ask whoever revoked it to lift the revocation",
    )
