"""Range-based reconciliation: find and exchange what two replicas do not share.

The initiator holds all state in a :class:`Session`; the responder answers each request
from what it holds and forgets it, so a peer cannot make it keep anything.

    HELLO --equal--> DONE
      |  authority differs             slots differ
      +--> AUTHORITY --> HELLO (again) --> SLOTS --> DONE

The authority tree comes first, and again while it makes progress: without the grants
the rest would be refused. Within a tree the initiator expands the ranges whose
fingerprints differ (1/16 each time), compares lists of up to 100 ids, asks for what it
lacks and then sends what the responder lacks: in that order, because what arrives may
replace what would have been sent.

Everything is bounded: requests per session, spans and ids pending, bytes per message.
What did not fit is found again by the next session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import Protocol

from crdt_store.messages import (
    MAX_CARRIED,
    MAX_CARRIED_BYTES,
    MAX_EXPAND,
    MAX_LISTED,
    MAX_WANTED,
    PARTS,
    REQUEST,
    RESPONSE,
    SHORT_ID_BYTES,
    Answer,
    Ask,
    Digest,
    Hello,
    Listing,
    Part,
    Request,
    Span,
    Trees,
    Wanted,
)
from crdt_store.ranges import END, RangeIndex
from fabric.core.digest import digest
from fabric.core.errors import LocalProtocolError, RemoteProtocolError

_SMALL = 8
"""A part this small is listed at once: its ids cost little more than a fingerprint."""
MAX_REQUESTS = 2000
"""200,000 entries of 300 B are some 300 requests."""
_MAX_PENDING_SPANS = 50_000
_MAX_PENDING_IDS = 250_000
_MAX_AUTHORITY_ROUNDS = 4
"""The depth of authority: root, owner, admin, redemption."""

_WHOLE = Span(0, END - 1)


class Catalogue(Protocol):
    """What reconciliation reads of a replica."""

    def index(self, *, authority: bool) -> RangeIndex:
        """Return the offered ids of one of the two trees."""
        ...

    def unoffered(self) -> Iterable[bytes]:
        """Return the ids of entries that are held and not offered."""
        ...

    def raw(self, entry_id: bytes) -> bytes | None:
        """Return the offered entry with this id."""
        ...


def _short(salt: bytes, entry_id: bytes) -> bytes:
    return digest(salt + entry_id)[:SHORT_ID_BYTES]


def _shorts(ids: bytes) -> list[bytes]:
    return [ids[at : at + SHORT_ID_BYTES] for at in range(0, len(ids), SHORT_ID_BYTES)]


def _listed(index: RangeIndex, span: Span | Wanted, salt: bytes) -> dict[bytes, bytes]:
    """Return the first ids in ``span`` by short id: as many as a listing holds."""
    items = index.items(span.first, span.last + 1)[:MAX_LISTED]
    return {_short(salt, entry_id): entry_id for _, entry_id in items}


def _fitting(raws: Iterable[bytes]) -> tuple[bytes, ...]:
    """Return the leading entries that fit one message."""
    chosen: list[bytes] = []
    room = MAX_CARRIED_BYTES
    for raw in raws:
        room -= len(raw)
        if room < 0 or len(chosen) == MAX_CARRIED:
            break
        chosen.append(raw)
    return tuple(chosen)


# --- the responder


def parse_request_untrusted(data: bytes) -> Request:
    """Return the decoded request of a peer.

    Raises:
        RemoteProtocolError: malformed, or out of bounds.
    """
    request = REQUEST.decode_untrusted(data)
    if isinstance(request, Ask):
        ranges: tuple[Span | Wanted, ...] = (*request.spans, *request.wanted)
        if any(asked.first > asked.last for asked in ranges):
            raise RemoteProtocolError("span ends before it starts")
        if any(len(wanted.ids) % SHORT_ID_BYTES for wanted in request.wanted):
            raise RemoteProtocolError("ids wanted end inside an id")
        if sum(map(len, request.entries)) > MAX_CARRIED_BYTES:
            raise RemoteProtocolError("more entries than one message may carry")
    return request


def answer(catalogue: Catalogue, request: Request) -> bytes:
    """Return the response to ``request``, whose entries were already taken in."""
    salt = request.salt
    if isinstance(request, Hello):
        trees = (catalogue.index(authority=a) for a in (True, False))
        return RESPONSE.encode(Trees(*(tree.fingerprint(salt=salt) for tree in trees)))
    index = catalogue.index(authority=request.authority)
    spans = tuple(_expand(index, span, salt) for span in request.spans)
    entries = _fitting(_wanted_raws(catalogue, index, request))
    return RESPONSE.encode(Answer(spans, entries))


def _wanted_raws(
    catalogue: Catalogue, index: RangeIndex, request: Ask
) -> Iterator[bytes]:
    for wanted in request.wanted:
        listed = _listed(index, wanted, request.salt)
        for short in _shorts(wanted.ids):
            raw = catalogue.raw(listed.get(short, b""))
            if raw is not None:
                yield raw


def _expand(index: RangeIndex, span: Span, salt: bytes) -> tuple[Part, ...]:
    low, high = span.first, span.last + 1
    if index.count(low, high) <= MAX_LISTED:
        return (_listing(index, low, high, salt),)
    parts: list[Part] = []
    for bound in index.cuts(low, high, PARTS):
        if index.count(low, bound) <= _SMALL or (low, bound) == (span.first, high):
            parts.append(_listing(index, low, bound, salt))
        else:
            parts.append(Digest(bound - 1, index.fingerprint(low, bound, salt=salt)))
        low = bound
    return tuple(parts)


def _listing(index: RangeIndex, low: int, high: int, salt: bytes) -> Listing:
    return Listing(high - 1, b"".join(_listed(index, Span(low, high - 1), salt)))


# --- the initiator


class Phase(Enum):
    """Where a session stands."""

    HELLO = auto()
    AUTHORITY = auto()
    SLOTS = auto()
    DONE = auto()


class Session:
    """One reconciliation, seen from the side that started it.

    The shell alternates: ``next_request``, send, ``receive_untrusted``, take in the
    entries it returns, until ``next_request`` returns None.

    Args:
        catalogue: Ours.
        salt: SALT_BYTES that nobody could know before.
    """

    def __init__(self, catalogue: Catalogue, salt: bytes) -> None:
        self._catalogue = catalogue
        self._salt = salt
        self._phase = Phase.HELLO
        self._spans: deque[Span] = deque()
        self._wanted: deque[Wanted] = deque()
        self._num_wanted = 0
        self._offers: deque[bytes] = deque()
        self._asked: Hello | Ask | None = None
        self._authority_rounds = 0
        self._known: frozenset[bytes] | None = None
        self.num_requests = 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask or send."""
        return self._phase is Phase.DONE

    def next_request(self) -> bytes | None:
        """Return the next message for the responder, or None when done."""
        if self._asked is not None:
            raise LocalProtocolError("the last request has no response yet")
        if self._phase in (Phase.AUTHORITY, Phase.SLOTS) and not self._pending():
            after = {Phase.AUTHORITY: Phase.HELLO, Phase.SLOTS: Phase.DONE}
            self._phase = after[self._phase]
        if self._phase is Phase.DONE or self.num_requests >= MAX_REQUESTS:
            self._phase = Phase.DONE
            return None
        self.num_requests += 1
        self._asked = self._hello() if self._phase is Phase.HELLO else self._next_ask()
        return REQUEST.encode(self._asked)

    def _hello(self) -> Hello:
        trees = (self._catalogue.index(authority=a) for a in (True, False))
        return Hello(self._salt, *(tree.fingerprint(salt=self._salt) for tree in trees))

    def _pending(self) -> bool:
        return bool(self._spans or self._wanted or self._offers)

    def _next_ask(self) -> Ask:
        authority = self._phase is Phase.AUTHORITY
        num_spans = min(MAX_EXPAND, len(self._spans))
        spans = tuple(self._spans.popleft() for _ in range(num_spans))
        wanted = self._next_wanted(self._catalogue.index(authority=authority))
        entries = () if spans or wanted else self._next_offers()
        return Ask(self._salt, authority, spans, wanted, entries)

    def _next_wanted(self, index: RangeIndex) -> tuple[Wanted, ...]:
        """Return what is wanted next, less what came by other ways meanwhile."""
        chosen: list[Wanted] = []
        room = MAX_CARRIED
        while self._wanted and room > 0 and len(chosen) < MAX_WANTED:
            wanted = self._wanted.popleft()
            ours = _listed(index, wanted, self._salt)
            asked = _shorts(wanted.ids)
            missing = [short for short in asked if short not in ours]
            self._num_wanted -= len(asked)
            room -= len(missing)
            if missing:
                chosen.append(Wanted(wanted.first, wanted.last, b"".join(missing)))
        return tuple(chosen)

    def _next_offers(self) -> tuple[bytes, ...]:
        found = (self._catalogue.raw(entry_id) for entry_id in list(self._offers))
        entries = _fitting(raw or b"" for raw in found)  # b"": replaced meanwhile
        for _ in entries:
            self._offers.popleft()
        return tuple(entry for entry in entries if entry)

    def receive_untrusted(self, data: bytes) -> tuple[bytes, ...]:
        """Take in the response to the last request; return the entries it carries.

        Raises:
            RemoteProtocolError: malformed, or not an answer to what was asked. The
                session is over.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            raise LocalProtocolError("no request is waiting for a response")
        phase, self._phase = self._phase, Phase.DONE  # unless all goes well
        response = RESPONSE.decode_untrusted(data)
        match asked, response:
            case Hello(), Trees():
                self._phase = self._compare(asked, response)
                return ()
            case Ask(), Answer():
                self._take_answer(asked, response)
                self._phase = phase
                return response.entries
            case _:
                raise RemoteProtocolError(f"{type(response).__name__}: no answer here")

    def _compare(self, ours: Hello, theirs: Trees) -> Phase:
        if (
            ours.authority != theirs.authority
            and self._authority_rounds < _MAX_AUTHORITY_ROUNDS
        ):
            self._authority_rounds += 1
            self._spans.append(_WHOLE)
            return Phase.AUTHORITY
        if ours.slots != theirs.slots:
            self._spans.append(_WHOLE)
            return Phase.SLOTS
        return Phase.DONE

    def _take_answer(self, asked: Ask, response: Answer) -> None:
        if len(response.spans) != len(asked.spans):
            raise RemoteProtocolError("not one answer per span")
        index = self._catalogue.index(authority=asked.authority)
        for span, parts in zip(asked.spans, response.spans, strict=True):
            low = span.first
            for part in parts:
                if not low <= part.last <= span.last:
                    raise RemoteProtocolError("parts out of order")
                self._take_part(index, span, Span(low, part.last), part)
                low = part.last + 1
            if low != span.last + 1:
                raise RemoteProtocolError("parts do not cover their span")
        self._ask_again(asked, response)
        if len(self._spans) > _MAX_PENDING_SPANS or self._num_wanted > _MAX_PENDING_IDS:
            raise RemoteProtocolError("more differences than a replica may hold")

    def _take_part(
        self, index: RangeIndex, whole: Span, span: Span, part: Part
    ) -> None:
        low, high = span.first, span.last + 1
        if isinstance(part, Digest):
            if span == whole:
                raise RemoteProtocolError("a span was not divided")
            if index.fingerprint(low, high, salt=self._salt) != part.fingerprint:
                self._spans.append(span)
            return
        if len(part.ids) % SHORT_ID_BYTES:
            raise RemoteProtocolError("a listing ends inside an id")
        theirs = set(_shorts(part.ids))
        ours = {_short(self._salt, i): i for _, i in index.items(low, high)}
        self._offers.extend(ours[short] for short in sorted(ours.keys() - theirs))
        self._want(span, theirs - ours.keys())

    def _want(self, span: Span, missing: set[bytes]) -> None:
        if missing and self._known is None:
            ids = self._catalogue.unoffered()
            self._known = frozenset(_short(self._salt, entry_id) for entry_id in ids)
        wanted = sorted(missing - self._known) if self._known else sorted(missing)
        if wanted:
            self._wanted.append(Wanted(span.first, span.last, b"".join(wanted)))
            self._num_wanted += len(wanted)

    def _ask_again(self, asked: Ask, response: Answer) -> None:
        """Put back what was wanted and did not fit, as long as something came."""
        if not response.entries:
            return
        came = {_short(self._salt, digest(raw)) for raw in response.entries}
        for wanted in reversed(asked.wanted):
            left = [short for short in _shorts(wanted.ids) if short not in came]
            if left:
                again = Wanted(wanted.first, wanted.last, b"".join(left))
                self._wanted.appendleft(again)
                self._num_wanted += len(left)
