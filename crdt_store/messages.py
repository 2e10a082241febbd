"""Wire messages of the store: gossip pushes and reconciliation.

    Hello ->          salt, both trees' fingerprints: 32 B; equal: the session is over
           <- Trees   22 B
    Ask ->            ranges to expand, ids wanted, entries the responder lacks
           <- Answer  the ranges' parts (fingerprint, or list of short ids), entries

The responder keeps nothing between two requests. A short id is a hash of the session's
salt and the entry's id: two that collide do so in one session only, and no author can
bring it about. RPC method ``store.sync``; gossip
topic ``fabric/store/<mesh id>``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from crdt_store.entry import MAX_ENTRY_BYTES
from crdt_store.ranges import END, FINGERPRINT_BYTES
from fabric.core.codec import Codec

SALT_BYTES = 8
SHORT_ID_BYTES = 6
"""An id in a list: of 100 compared with 100, one hides by chance once in 2^35 lists,
until the next session."""
MAX_EXPAND = 64
"""Ranges in one Ask."""
PARTS = 16
"""Sub-ranges of an expanded range."""
MAX_LISTED = 100
"""Up to here a range is listed, not fingerprinted (research: 100 keys)."""
MAX_WANTED = 128
"""Ranges in one Ask from which ids are wanted."""
MAX_CARRIED = 1000
"""Entries in one message."""
MAX_CARRIED_BYTES = 256 << 10
"""Bytes of entries in one message: a slow link still answers within the deadline."""
MAX_PUSH_BYTES = 60 << 10
"""One gossip message (the transport takes 64 KiB)."""

SYNC_METHOD = "store.sync"

Fingerprint = Annotated[
    bytes, msgspec.Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)
]
Bound = Annotated[int, msgspec.Meta(ge=0, lt=END)]
"""A position; spans and parts include both ends."""
Salt = Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]
ShortIds = Annotated[bytes, msgspec.Meta(max_length=MAX_LISTED * SHORT_ID_BYTES)]
"""Short ids of one range, concatenated."""
RawEntry = Annotated[bytes, msgspec.Meta(max_length=MAX_ENTRY_BYTES)]
Raws = Annotated[tuple[RawEntry, ...], msgspec.Meta(max_length=MAX_CARRIED)]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Fingerprints of everything the initiator holds."""

    salt: Salt
    authority: Fingerprint
    slots: Fingerprint


class Trees(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Fingerprints of everything the responder holds, with the initiator's salt."""

    authority: Fingerprint
    slots: Fingerprint


class Span(msgspec.Struct, frozen=True, array_like=True):
    """The range from ``first`` to ``last``, both included."""

    first: Bound
    last: Bound


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """Entries missing in the range from ``first`` to ``last``, both included."""

    first: Bound
    last: Bound
    ids: ShortIds


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Expand these ranges; send these; take these."""

    salt: Salt
    authority: bool
    """Which tree the spans and ids are of."""
    spans: Annotated[tuple[Span, ...], msgspec.Meta(max_length=MAX_EXPAND)] = ()
    wanted: Annotated[tuple[Wanted, ...], msgspec.Meta(max_length=MAX_WANTED)] = ()
    entries: Raws = ()


class Digest(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A part too large to list."""

    last: Bound
    fingerprint: Fingerprint


class Listing(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A part with the ids of all its entries."""

    last: Bound
    ids: ShortIds


Part = Digest | Listing
Parts = Annotated[tuple[Part, ...], msgspec.Meta(max_length=PARTS)]


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """For each span its parts in order, and the wanted entries that fit."""

    spans: Annotated[tuple[Parts, ...], msgspec.Meta(max_length=MAX_EXPAND)] = ()
    entries: Raws = ()


class Push(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Entries their author just wrote."""

    entries: Raws


Request = Hello | Ask
Response = Trees | Answer

REQUEST: Codec[Request] = Codec(Request, max_bytes=1 << 20)
RESPONSE: Codec[Response] = Codec(Response, max_bytes=2 << 20)
PUSH: Codec[Push] = Codec(Push, max_bytes=64 << 10)
