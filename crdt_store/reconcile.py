"""Range-based reconciliation: find and exchange what two replicas do not share.

The initiator holds all state in a :class:`Session`; the responder answers each request
from what it holds and forgets it, so a peer cannot make it keep anything.

    HELLO --equal--> DONE
      |  authority differs             slots differ
      +--> AUTHORITY --> HELLO (again) --> SLOTS --> DONE

The authority tree comes first, and again while it makes progress: without the grants
the rest would be refused. Within a tree the initiator expands the ranges whose
fingerprints differ (1/16 each time), compares lists of up to 100 ids, asks for what it
lacks and sends what the responder lacks.

Everything is bounded: requests per session, spans and ids pending, bytes per message.
What did not fit is found again by the next session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol

from crdt_store.messages import (
    ID_PREFIX_BYTES,
    MAX_CARRIED,
    MAX_CARRIED_BYTES,
    MAX_EXPAND,
    MAX_LISTED,
    MAX_WANTED,
    PARTS,
    REQUEST,
    RESPONSE,
    Answer,
    Ask,
    Digest,
    Hello,
    Listing,
    Part,
    Request,
    Span,
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

    def holds(self, prefix: bytes) -> bool:
        """Return whether an entry with this id prefix is held, offered or not."""
        ...

    def raw(self, prefix: bytes) -> bytes | None:
        """Return the offered entry with this id prefix."""
        ...


def _prefix(entry_id: bytes) -> bytes:
    return entry_id[:ID_PREFIX_BYTES]


def _hello(catalogue: Catalogue) -> Hello:
    return Hello(
        catalogue.index(authority=True).fingerprint(),
        catalogue.index(authority=False).fingerprint(),
    )


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
        if any(span.first > span.last for span in request.spans):
            raise RemoteProtocolError("span ends before it starts")
        if sum(map(len, request.entries)) > MAX_CARRIED_BYTES:
            raise RemoteProtocolError("more entries than one message may carry")
    return request


def answer(catalogue: Catalogue, request: Request) -> bytes:
    """Return the response to ``request``, whose entries were already taken in."""
    if isinstance(request, Hello):
        return RESPONSE.encode(_hello(catalogue))
    index = catalogue.index(authority=request.authority)
    spans = tuple(_expand(index, span) for span in request.spans)
    found = (catalogue.raw(prefix) for prefix in request.wanted)
    entries = _fitting(raw for raw in found if raw is not None)
    return RESPONSE.encode(Answer(spans, entries))


def _expand(index: RangeIndex, span: Span) -> tuple[Part, ...]:
    low, high = span.first, span.last + 1
    if index.count(low, high) <= MAX_LISTED:
        return (_listing(index, low, high),)
    parts: list[Part] = []
    for bound in index.cuts(low, high, PARTS):
        if index.count(low, bound) <= _SMALL or (low, bound) == (span.first, high):
            parts.append(_listing(index, low, bound))
        else:
            parts.append(Digest(bound - 1, index.fingerprint(low, bound)))
        low = bound
    return tuple(parts)


def _listing(index: RangeIndex, low: int, high: int) -> Listing:
    ids = (_prefix(entry_id) for _, entry_id in index.items(low, high)[:MAX_LISTED])
    return Listing(high - 1, b"".join(ids))


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
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._phase = Phase.HELLO
        self._spans: deque[Span] = deque()
        self._wanted: deque[bytes] = deque()
        self._offers: deque[bytes] = deque()
        self._asked: Hello | Ask | None = None
        self._authority_rounds = 0
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
        request = (
            _hello(self._catalogue) if self._phase is Phase.HELLO else self._next_ask()
        )
        self._asked = request
        return REQUEST.encode(request)

    def _pending(self) -> bool:
        return bool(self._spans or self._wanted or self._offers)

    def _next_ask(self) -> Ask:
        spans = [
            self._spans.popleft() for _ in range(min(MAX_EXPAND, len(self._spans)))
        ]
        num_wanted = min(MAX_WANTED, len(self._wanted))
        wanted = [self._wanted.popleft() for _ in range(num_wanted)]
        found = (self._catalogue.raw(prefix) for prefix in list(self._offers))
        entries = _fitting(raw or b"" for raw in found)
        for _ in entries:
            self._offers.popleft()
        authority = self._phase is Phase.AUTHORITY
        return Ask(
            authority, tuple(spans), tuple(wanted), tuple(e for e in entries if e)
        )

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
            case Hello(), Hello():
                self._phase = self._compare(asked, response)
                return ()
            case Ask(), Answer():
                self._take_answer(asked, response)
                self._phase = phase
                return response.entries
            case _:
                raise RemoteProtocolError(f"{type(response).__name__}: no answer here")

    def _compare(self, ours: Hello, theirs: Hello) -> Phase:
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
        if (
            len(self._spans) > _MAX_PENDING_SPANS
            or len(self._wanted) > _MAX_PENDING_IDS
        ):
            raise RemoteProtocolError("more differences than a replica may hold")

    def _take_part(
        self, index: RangeIndex, whole: Span, span: Span, part: Part
    ) -> None:
        low, high = span.first, span.last + 1
        if isinstance(part, Digest):
            if span == whole:
                raise RemoteProtocolError("a span was not divided")
            if index.fingerprint(low, high) != part.fingerprint:
                self._spans.append(span)
            return
        if len(part.ids) % ID_PREFIX_BYTES:
            raise RemoteProtocolError("a listing ends inside an id")
        theirs = {
            part.ids[at : at + ID_PREFIX_BYTES]
            for at in range(0, len(part.ids), ID_PREFIX_BYTES)
        }
        ours = {_prefix(entry_id) for _, entry_id in index.items(low, high)}
        self._offers.extend(sorted(ours - theirs))
        self._wanted.extend(
            prefix
            for prefix in sorted(theirs - ours)
            if not self._catalogue.holds(prefix)
        )

    def _ask_again(self, asked: Ask, response: Answer) -> None:
        """Put back what was wanted and did not fit, as long as something came."""
        if not response.entries:
            return
        came = {_prefix(digest(raw)) for raw in response.entries}
        self._wanted.extendleft(p for p in reversed(asked.wanted) if p not in came)
