"""One replica: slots, authority and fingerprints behind a single door, without I/O.

Everything that enters is judged in one place (:meth:`Replica.ingest_untrusted`):

    decode -> mesh -> already known? -> expired? -> authority -> signature -> due?

A refusal leaves every view as it was and blacklists nothing: an entry refused today for
lack of a grant is offered again by the next reconciliation.

When authority shrinks (a revocation, an invite drawn by more than its uses) what is
held is judged again and void entries leave; since that judgement depends on entries and
records alone, replicas that hold the same records end with the same slots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from crdt_store.authority import Authority
from crdt_store.clock import MAX_FUTURE_SECONDS, HybridClock, wall_seconds
from crdt_store.entry import Entry, Slot, decode_entry_untrusted, sign_entry
from crdt_store.grants import (
    GRANT_PREFIX,
    REDEMPTION_PREFIX,
    REVOCATION_PREFIX,
    ROOT_PREFIX,
    Mesh,
    decode_batch_untrusted,
    is_authority_key,
)
from crdt_store.outcome import Changes, Outcome
from crdt_store.ranges import RangeIndex, position
from crdt_store.slots import Slots, Standing
from fabric.core.digest import digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import public_key_of
from fabric.core.signing import Signer

_MAX_HELD = 1024
"""Entries from the future kept until they are due; further ones are offered again."""
MAX_REDEMPTION_AGE_SECONDS = 3600.0
"""A redemption shown live may be this much older than our last reconciliation."""


_RETRY = frozenset({Outcome.UNAUTHORISED, Outcome.NO_INVITE})
"""May become valid by another entry of the same batch."""


class Replica:
    """The state of one peer in one mesh.

    Args:
        mesh: Name and root key.
        own: Our 32-byte public key.
        clock_mark: The clock's mark on disk.
        max_entries: Slots held at most.
        max_entries_per_author: Slots of one author held at most.
    """

    def __init__(
        self,
        mesh: Mesh,
        own: bytes,
        *,
        clock_mark: int = 0,
        max_entries: int = 200_000,
        max_entries_per_author: int = 20_000,
    ) -> None:
        self.mesh = mesh
        self.authority = Authority(mesh)
        self.slots = Slots()
        self.clock = HybridClock(clock_mark)
        self._mesh_id = mesh.id
        self._own = own
        self._max_entries = max_entries
        self._max_per_author = max_entries_per_author
        self._indexes = {True: RangeIndex(), False: RangeIndex()}
        self._offered: dict[bytes, Entry] = {}  # by id
        self._fading: dict[bytes, Entry] = {}
        self._future: dict[bytes, Entry] = {}
        self._changes = Changes()
        self._touched: set[str] = set()

    # --- the door

    def ingest_untrusted(
        self, raw: bytes, now: float, *, fresh_after: float | None = None
    ) -> Outcome:
        """Judge and, if valid, take in an entry from anywhere.

        Args:
            raw: Bytes as received.
            now: Wall seconds.
            fresh_after: Refuse redemptions written before this time. Given for what a
                peer shows live (admission, gossip): with a leaked, forgotten invite
                nobody can back-date a redemption. None in a reconciliation with a
                member: after a long partition the other side's redemptions are
                legitimately old, and refusing them there would leave two halves with
                different members for ever. A member that launders a back-dated
                redemption is stopped by revoking the invite's key.
        """
        try:
            entry = decode_entry_untrusted(raw)
        except RemoteProtocolError:
            return Outcome.MALFORMED
        return self._offer(entry, now, fresh_after)

    def ingest_batch_untrusted(
        self, raws: Iterable[bytes], now: float, *, fresh_after: float | None = None
    ) -> Counter[Outcome]:
        """Take in entries in any order, authority first; count the outcomes."""
        entries, malformed = decode_batch_untrusted(raws)
        outcomes = self.offer_batch(entries, now, fresh_after=fresh_after)
        if malformed:
            outcomes[Outcome.MALFORMED] += malformed
        return outcomes

    def offer_batch(
        self, entries: Sequence[Entry], now: float, *, fresh_after: float | None = None
    ) -> Counter[Outcome]:
        """Do the same with entries already decoded (not yet judged in any way)."""
        return self._offer_all(entries, now, fresh_after)

    def restore(self, raws: Iterable[bytes], now: float) -> None:
        """Take in what our own disk holds, without checking signatures again.

        Nor is anything held until it is due: it was due when we took it in, and a clock
        that was set back since must not cost us what we acknowledged.

        Raises:
            RemoteProtocolError: not an entry: the disk is damaged.
        """
        entries = [decode_entry_untrusted(raw) for raw in raws]
        stored = {entry.slot for entry in entries}
        self._offer_all(entries, now, None, signed=True)
        self._changes = Changes()
        self._changes.deletes = {s for s in stored if self.slots.get(s) is None}

    def _offer_all(
        self,
        entries: Sequence[Entry],
        now: float,
        fresh_after: float | None,
        *,
        signed: bool = False,
    ) -> Counter[Outcome]:
        outcomes: Counter[Outcome] = Counter()
        waiting = sorted(
            (e for e in entries if is_authority_key(e.key)), key=lambda e: e.key
        )
        while waiting:
            again: list[Entry] = []
            for entry in waiting:
                outcome = self._offer(entry, now, fresh_after, signed=signed)
                if outcome in _RETRY:
                    again.append(entry)
                else:
                    outcomes[outcome] += 1
            if len(again) == len(waiting):
                outcomes[Outcome.UNAUTHORISED] += len(again)
                break
            waiting = again
        for entry in entries:
            if not is_authority_key(entry.key):
                outcomes[self._offer(entry, now, fresh_after, signed=signed)] += 1
        return outcomes

    def _offer(
        self,
        entry: Entry,
        now: float,
        fresh_after: float | None,
        *,
        signed: bool = False,
    ) -> Outcome:
        standing = self.slots.standing(entry)
        refusal = self._cheap_refusal(entry, standing, now)
        if refusal is not None:
            return refusal
        if reason := self.authority.refusal(entry):
            return Outcome(reason)
        is_redemption = entry.key.startswith(REDEMPTION_PREFIX)
        if is_redemption and fresh_after is not None and entry.seconds < fresh_after:
            return Outcome.STALE_REDEMPTION
        if not signed and not entry.signature_matches():
            return Outcome.BAD_SIGNATURE
        if entry.seconds > now + MAX_FUTURE_SECONDS and not signed:
            return self._hold(entry)
        if standing is Standing.CONFLICT and not self._wins_conflict(entry):
            return Outcome.EQUIVOCATION
        self.apply(entry, now)
        return Outcome.ACCEPTED

    def _cheap_refusal(
        self, entry: Entry, standing: Standing, now: float
    ) -> Outcome | None:
        if entry.mesh != self._mesh_id:
            return Outcome.WRONG_MESH
        if standing is Standing.SAME:
            return Outcome.DUPLICATE
        if standing is Standing.OLDER:
            return Outcome.OLD
        if entry.expires_at <= now:
            return Outcome.EXPIRED
        if standing is Standing.NEWER and self.slots.get(entry.slot) is None:
            full = len(self.slots) >= self._max_entries
            if full or self.slots.num_authored(entry.author) >= self._max_per_author:
                return Outcome.FULL
        return None

    def _hold(self, entry: Entry) -> Outcome:
        if len(self._future) < _MAX_HELD:
            self._future[entry.id] = entry
        return Outcome.HELD

    def _wins_conflict(self, entry: Entry) -> bool:
        held = self.slots.get(entry.slot)
        assert held is not None
        if self.slots.keep_evidence(held, entry):
            self._changes.evidence.append((held, entry))
        return entry.id > held.id

    # --- our own writes

    def sign(
        self, signer: Signer, key: str, value: bytes, ttl_seconds: int, now: float
    ) -> Entry:
        """Return our next entry for ``key``, not yet applied.

        Its clock must be covered by a mark on disk before it leaves
        (:meth:`HybridClock.mark_to_save`). The lifetime is stretched to outlast the
        entry it replaces: otherwise a peer that missed the new one would bring the old
        one back after the new one expired.
        """
        held = self.slots.get((key, signer.public_key))
        hlc = self.clock.tick(now)
        if held is not None and ttl_seconds:
            left = held.expires_at - wall_seconds(hlc)  # from where a lifetime counts
            ttl_seconds = 0 if left == math.inf else max(ttl_seconds, math.ceil(left))
        return sign_entry(signer, self._mesh_id, key, hlc, ttl_seconds, value)

    def commit_own(self, entry: Entry, now: float) -> bool:
        """Apply an entry of ours that is on disk; return whether it still is valid.

        Meanwhile it may have lost its authority, or to a later one of its slot.
        """
        newer = self.slots.standing(entry) is Standing.NEWER
        if not newer or self.authority.refusal(entry):
            return False
        self.apply(entry, now)
        self._changes.upserts.pop(entry.slot)
        return True

    # --- state

    def apply(self, entry: Entry, now: float) -> None:
        """Make a valid ``entry`` the winner of its slot."""
        before = self.slots.put(entry)
        if before is not None:
            self._unlist(before)
        if entry.fades_at > now:
            self._offered[entry.id] = entry
            self._index_of(entry).add(position(entry.slot), entry.id)
        else:
            self._fading[entry.id] = entry
        self._changes.upserts[entry.slot] = entry
        self._changes.deletes.discard(entry.slot)
        self._touched.add(entry.key.split("/", 1)[0])
        self.clock.observe(entry.hlc, now, own=entry.author == self._own)
        if is_authority_key(entry.key):
            self.authority.add(entry)
            self._follow(entry, replaced=before is not None)

    def tick(self, now: float) -> None:
        """Drop what expired, stop offering what fades, judge what is now due."""
        dropped_authority = False
        for entry, final in self.slots.due(now):
            if final:
                self._drop(entry.slot)
                dropped_authority |= is_authority_key(entry.key)
            else:
                self._unlist(entry)
                self._fading[entry.id] = entry
        if dropped_authority:
            self._judge_all()
        due = [
            e for e in self._future.values() if e.seconds <= now + MAX_FUTURE_SECONDS
        ]
        for entry in due:
            del self._future[entry.id]
            self._offer(entry, now, None)

    def next_tick(self) -> float:
        """Return the wall seconds before which :meth:`tick` does nothing."""
        held = min((e.seconds for e in self._future.values()), default=math.inf)
        return min(self.slots.next_due(), held - MAX_FUTURE_SECONDS)

    def take_changes(self) -> Changes:
        """Return and forget what the disk does not hold yet."""
        changes, self._changes = self._changes, Changes()
        return changes

    def take_touched(self) -> set[str]:
        """Return and forget the tables (first key segments) changed since the last."""
        touched, self._touched = self._touched, set()
        return touched

    def _index_of(self, entry: Entry) -> RangeIndex:
        return self._indexes[is_authority_key(entry.key)]

    def _unlist(self, entry: Entry) -> None:
        self._fading.pop(entry.id, None)
        if self._offered.pop(entry.id, None) is not None:
            self._index_of(entry).remove(position(entry.slot), entry.id)

    def _drop(self, slot: Slot) -> None:
        entry = self.slots.drop(slot)
        self._unlist(entry)
        self._changes.upserts.pop(slot, None)
        self._changes.deletes.add(slot)
        self._touched.add(entry.key.split("/", 1)[0])
        if is_authority_key(entry.key):
            self.authority.remove(slot)

    # --- when authority changes

    def _follow(self, entry: Entry, *, replaced: bool) -> None:
        """Judge again what a new authority entry may have made void."""
        if entry.key.startswith(REDEMPTION_PREFIX):
            invite_key = entry.key.split("/")[1]
            if self.authority.overdrawn(invite_key):
                for joiner in self.authority.joiners(invite_key):
                    self._judge(self.slots.authored(public_key_of(joiner)))
        elif replaced or entry.key.startswith((REVOCATION_PREFIX, ROOT_PREFIX)):
            self._judge_all()
        elif entry.key.startswith(GRANT_PREFIX):
            # a promoted peer is no longer revoked by an equal; a higher rank makes
            # nothing else void, so founding a mesh of N members costs N, not N^2
            subject = entry.key.removeprefix(GRANT_PREFIX)
            if self._judge(self.authority.revocations_of(subject)):
                self._judge_all()

    def _judge(self, entries: Iterable[Entry]) -> bool:
        void = [e.slot for e in entries if self.authority.refusal(e)]
        for slot in void:
            self._drop(slot)
        return bool(void)

    def _judge_records(self) -> bool:
        """Drop void authority entries, from the top down; return whether any was."""
        dropped = False
        while self._judge([*self.slots.under("0/"), *self.slots.under("inv/")]):
            dropped = True
        return dropped

    def _judge_all(self) -> None:
        self._judge_records()
        self._judge(list(self.slots))

    # --- for reconciliation

    def index(self, *, authority: bool) -> RangeIndex:
        """Return the offered ids of the authority tree or of the rest."""
        return self._indexes[authority]

    def unoffered(self) -> Iterable[bytes]:
        """Return the ids of entries that are held and fade: offered no more."""
        return self._fading.keys()

    def raw(self, entry_id: bytes) -> bytes | None:
        """Return the offered entry with this id."""
        entry = self._offered.get(entry_id)
        return entry.raw if entry is not None else None

    def state_hash(self) -> str:
        """Return a hash that is equal on replicas that offer the same entries."""
        trees = (self._indexes[authority].whole_digest() for authority in (True, False))
        return digest(b"".join(trees)).hex()

    def authority_entries(self) -> list[bytes]:
        """Return every authority entry, those others depend on first."""
        entries = [*self.slots.under("0/"), *self.slots.under("inv/")]
        return [entry.raw for entry in sorted(entries, key=lambda e: e.key)]

    def check_integrity(self) -> None:
        """Assert that indexes, positions and slots agree and all held is valid."""
        listed = 0
        for index in self._indexes.values():
            index.check_integrity()
            listed += len(index)
        assert listed == len(self._offered)
        assert len(self._offered) + len(self._fading) == len(self.slots)
        for entry in self.slots:
            assert self.authority.refusal(entry) == ""
            known = self._offered.get(entry.id) or self._fading.get(entry.id)
            assert known is entry
