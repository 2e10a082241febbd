"""Typed tables over the slots; nobody outside this package sees a raw key.

Reading is synchronous, from memory, and skips values that do not decode. Writing
returns after the commit. Where several authors may publish, the table says how their
slots are folded. Who is not there does not show where that matters.

    m/<peer>              MemberRecord      its own
    c/<run>/<step>        CheckpointHead    by agreement, then the latest
    p/<model>/<peer>      opaque bytes      its own
    t/<subject>/<peer>    verdict           all kept, one per verifier
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Annotated, Generic, Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from attestation.ports import Verdict
from attestation.states import State, Tier
from crdt_store.entry import MAX_VALUE_BYTES, Entry
from crdt_store.presence import Absence, Word
from crdt_store.slots import Slots
from fabric.core.codec import Codec
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId, public_key_of

M = TypeVar("M")
Put = Callable[[str, bytes, int], Awaitable[Entry]]
"""key, value, ttl_seconds; returns after the commit."""

DAY_SECONDS = 86400
MEMBER_TTL_SECONDS = DAY_SECONDS
PLACEMENT_TTL_SECONDS = 6 * 3600
HEAD_TTL_SECONDS = 30 * DAY_SECONDS
RETIRED_TTL_SECONDS = DAY_SECONDS
"""A retired head hides the older one from peers that were away, then goes as well."""
MAX_PIECES = 32
VERDICT_TTL_SECONDS = 30 * DAY_SECONDS

Text = Annotated[str, msgspec.Meta(max_length=200)]
Name = Annotated[str, msgspec.Meta(max_length=100)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
_MAY_COME = ("", "dead")
"""Absences of a member that did not leave."""
_SEGMENT = re.compile(r"[A-Za-z0-9._:@+=-]{1,64}")


class Watch(Protocol):
    """Wakes after changes; coalescing (see watch_service.py)."""

    async def changed(self) -> None:
        """Return once something changed since the last return (or creation)."""
        ...

    def __aiter__(self) -> AsyncIterator[None]:
        """Yield after each (coalesced) change, for ever."""
        ...


def there(peer: PeerId) -> Absence:
    """Say that ``peer`` is there, for want of anybody who knows."""
    return ""


class View:
    """What all tables share.

    Args:
        slots: The winners held.
        put: Writes a slot of ours.
        watch: Makes a watch of tables by name.
        me: Our PeerId.

    Attributes:
        absence: Why a peer is not there, or "": see :mod:`crdt_store.presence`.
    """

    table = ""

    def __init__(
        self, slots: Slots, put: Put, watch: Callable[..., Watch], me: PeerId
    ) -> None:
        self._slots = slots
        self._put = put
        self._watch = watch
        self._me = me
        self.absence: Callable[[PeerId], Absence] = there

    def watch(self) -> Watch:
        """Return a watch of this table."""
        # who is a member decides which slots count, so authority wakes every table
        return self._watch(self.table, "0", "inv")


def segment(text: str) -> str:
    """Return ``text`` if it can stand between two slashes of a key.

    Raises:
        ValueError: empty, longer than 64, or other than letters, digits and ._:@+=-.
    """
    if not _SEGMENT.fullmatch(text):
        raise ValueError(f"{text!r} cannot name a slot")
    return text


class Values(Generic[M]):
    """Codec of one table's values that turns nonsense into None."""

    def __init__(self, type_: object) -> None:
        self._codec: Codec[M] = Codec(type_, max_bytes=MAX_VALUE_BYTES)

    def encode(self, value: M) -> bytes:
        """Return the encoded ``value``."""
        return self._codec.encode(value)

    def read(self, entry: Entry | None) -> M | None:
        """Return the value of ``entry``; None if there is none or it is malformed."""
        if entry is None:
            return None
        try:
            return self._codec.decode_untrusted(entry.value)
        except RemoteProtocolError:
            return None


class Hardware(msgspec.Struct, frozen=True):
    """What a member's machine has."""

    cpus: Count = 0
    memory_bytes: Count = 0


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a member says about itself.

    Attributes:
        name: For people; not unique.
        addrs: Multiaddrs it can be dialled at.
        version: Of peerfabric.
        incarnation: Starts counted by the member; a later one is a restart.
        roles: What it offers ("relay", ...), not what it may do.
        data_addrs: "ip:port" at which the world reaches its data plane, if it does:
            peers behind NATs learn there how they are seen.
        left: It said goodbye; the record only tells that.
    """

    name: Name
    addrs: Annotated[tuple[Text, ...], msgspec.Meta(max_length=16)] = ()
    version: Name = ""
    hardware: Hardware = Hardware()
    incarnation: Count = 0
    roles: Annotated[tuple[Name, ...], msgspec.Meta(max_length=8)] = ()
    data_addrs: Annotated[tuple[Name, ...], msgspec.Meta(max_length=8)] = ()
    left: bool = False


_MEMBER: Values[MemberRecord] = Values(MemberRecord)


class Members(View):
    """One record per member, written by it; TTL 24 h, refresh every 6 h."""

    table = "m"

    async def put(self, record: MemberRecord) -> None:
        """Publish our own record."""
        value = _MEMBER.encode(record)
        await self._put(f"m/{self._me}", value, MEMBER_TTL_SECONDS)

    def get(self, peer: PeerId) -> MemberRecord | None:
        """Return the record of ``peer``, a member or not, unless it left."""
        record = self._own_word(peer)
        return None if record is None or record.left else record

    def says(self, peer: PeerId) -> Word:
        """Return what ``peer`` said of itself within the lifetime of a record."""
        record = self._own_word(peer)
        if record is None:
            return "nothing"
        return "left" if record.left else "here"

    def _own_word(self, peer: PeerId) -> MemberRecord | None:
        return _MEMBER.read(self._slots.get((f"m/{peer}", public_key_of(peer))))

    def all(self) -> dict[PeerId, MemberRecord]:
        """Return the records of all members who did not leave, ours included."""
        found = self.ever()
        return {peer: r for peer, r in found.items() if self.absence(peer) in _MAY_COME}

    def ever(self) -> dict[PeerId, MemberRecord]:
        """Return the records of all who did not leave, members any more or not."""
        found = self._read()
        return {peer: record for peer, record in found.items() if not record.left}

    def left(self) -> frozenset[PeerId]:
        """Return who said goodbye; they may still have the right to come back."""
        return frozenset(peer for peer, record in self._read().items() if record.left)

    def _read(self) -> dict[PeerId, MemberRecord]:
        found = {entry.peer: _MEMBER.read(entry) for entry in self._slots.under("m/")}
        return {peer: record for peer, record in found.items() if record is not None}

    def live(self) -> dict[PeerId, MemberRecord]:
        """Return the records of those who are not known to be gone."""
        return {peer: r for peer, r in self.ever().items() if not self.absence(peer)}


class CheckpointHead(msgspec.Struct, frozen=True, kw_only=True):
    """Where the checkpoint of one step is.

    Attributes:
        root: Blob root of its manifest.
        bytes: Size of all files.
        round: Outer round whose end it holds.
        writer: Peer that wrote it.
        copies: Peers that should hold it.
        keep: As many of the newest steps stay; 0: all.
        erasure: "k+m" if any k of ``pieces`` restore it.
        pieces: Roots of the pieces, in order; empty until they are made.
    """

    root: Annotated[str, msgspec.Meta(max_length=64)]
    bytes: Count
    round: Count
    writer: Annotated[PeerId, msgspec.Meta(max_length=64)]
    copies: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    keep: Count = 0
    erasure: Annotated[str, msgspec.Meta(max_length=8)] = ""
    pieces: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=64, max_length=64)], ...],
        msgspec.Meta(max_length=MAX_PIECES),
    ] = ()


_HEAD: Values[CheckpointHead] = Values(CheckpointHead)


class Heads(View):
    """Checkpoints by run and step; the newest ``keep`` of a run stay.

    If authors disagree about a step, the root most of them published stands, and among
    equals the latest. A head without a root says that its author retired the step.
    """

    table = "c"

    async def put(self, run: str, step: int, head: CheckpointHead) -> None:
        """Publish a checkpoint, then retire those of ours that it pushes out."""
        key = f"c/{segment(run)}/{step:d}"
        await self._put(key, _HEAD.encode(head), HEAD_TTL_SECONDS)
        stay = self.newest(run).keys()
        gone = _HEAD.encode(CheckpointHead(root="", bytes=0, round=0, writer=self._me))
        for entry in self._slots.under(f"c/{segment(run)}/"):
            retired = entry.peer == self._me and entry.value != gone
            if retired and int(entry.key.rsplit("/", 1)[1]) not in stay:
                await self._put(entry.key, gone, RETIRED_TTL_SECONDS)

    def latest(self, run: str) -> tuple[int, CheckpointHead] | None:
        """Return (step, head) of the greatest step."""
        return max(self.all(run).items(), key=lambda item: item[0], default=None)

    def newest(self, run: str) -> dict[int, CheckpointHead]:
        """Return the heads that stay: as many as the newest of them says."""
        found = self.all(run)
        steps = sorted(found, reverse=True)
        keep = found[steps[0]].keep if steps else 0
        return {step: found[step] for step in (steps[:keep] if keep else steps)}

    def runs(self) -> list[str]:
        """Return the runs that have, or had, a head."""
        return sorted({e.key.split("/")[1] for e in self._slots.under("c/")})

    def all(
        self, run: str, authors: Collection[PeerId] | None = None
    ) -> dict[int, CheckpointHead]:
        """Return the heads by step; of ``authors`` alone, if given."""
        by_step: dict[int, list[tuple[Entry, CheckpointHead]]] = defaultdict(list)
        for entry in self._slots.under(f"c/{segment(run)}/"):
            step = entry.key.rsplit("/", 1)[1]
            head = (
                _HEAD.read(entry) if authors is None or entry.peer in authors else None
            )
            if head is not None and head.root and step.isascii() and step.isdigit():
                by_step[int(step)].append((entry, head))
        return {step: _agreed(found) for step, found in sorted(by_step.items())}


def _agreed(found: list[tuple[Entry, CheckpointHead]]) -> CheckpointHead:
    votes: dict[str, int] = defaultdict(int)
    for _, head in found:
        votes[head.root] += 1
    return max(found, key=lambda pair: (votes[pair[1].root], pair[0].order))[1]


class Placements(View):
    """What each peer hosts of a model; opaque here. TTL 6 h, refresh every 3 h."""

    table = "p"

    async def put(self, model: str, placement: bytes) -> None:
        """Publish what we host of ``model``; empty bytes: nothing any more."""
        key = f"p/{segment(model)}/{self._me}"
        await self._put(key, placement, PLACEMENT_TTL_SECONDS)

    def get(self, model: str) -> dict[PeerId, bytes]:
        """Return what each peer that is there hosts of ``model``."""
        found = self._hosted(f"p/{segment(model)}/")
        return {entry.peer: entry.value for entry in found}

    def models(self) -> frozenset[str]:
        """Return every model that somebody who is there hosts."""
        return frozenset(entry.key.split("/")[1] for entry in self._hosted("p/"))

    def _hosted(self, prefix: str) -> list[Entry]:
        found = self._slots.under(prefix)
        return [e for e in found if e.value and not self.absence(e.peer)]


class _VerdictRecord(msgspec.Struct, frozen=True):
    state: State
    tier: Tier
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""
    evidence_digest: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


_VERDICT: Values[_VerdictRecord] = Values(_VerdictRecord)


class Verdicts(View):
    """Attestation results: implements :class:`attestation.ports.VerdictStore`."""

    table = "t"

    def __init__(
        self,
        slots: Slots,
        put: Put,
        watch: Callable[..., Watch],
        me: PeerId,
        *,
        put_soon: Callable[[str, bytes, int], None],
        revocation: Callable[[PeerId], str | None],
    ) -> None:
        super().__init__(slots, put, watch, me)
        self._put_soon = put_soon
        self._revocation = revocation

    def record(self, verdict: Verdict) -> None:
        """Keep our ``verdict`` and spread it, soon, if it says something new.

        The evidence of a routine pass differs each time and is no news: after a restart
        of ours everybody passes again, and every slot is stored by everyone.
        """
        key = f"t/{segment(verdict.subject)}/{self._me}"
        record = _VerdictRecord(
            verdict.state,
            verdict.tier,
            verdict.reason[:500],
            verdict.evidence_digest[:32],
        )
        known = _VERDICT.read(self._slots.get((key, public_key_of(self._me))))
        if (
            known is not None
            and record.evidence_digest
            and verdict.state is State.TRUSTED
        ):
            record = replace(record, evidence_digest=known.evidence_digest)
        if record != known:
            self._put_soon(key, _VERDICT.encode(record), VERDICT_TTL_SECONDS)

    def revocation(self, peer: PeerId) -> str | None:
        """Return why the mesh revoked ``peer``, or None."""
        return self._revocation(peer)

    def for_subject(self, peer: PeerId) -> Mapping[PeerId, Verdict]:
        """Return the verdicts about ``peer`` by verifier, members all.

        What a verifier found outlives its process, but not its membership.
        """
        found: dict[PeerId, Verdict] = {}
        for entry in self._slots.under(f"t/{segment(peer)}/"):
            record = _VERDICT.read(entry)
            if record is not None and self.absence(entry.peer) in _MAY_COME:
                found[entry.peer] = Verdict(
                    peer,
                    record.state,
                    record.tier,
                    record.reason,
                    record.evidence_digest,
                )
        return found
