r"""One author's part of a document: a pycrdt document that only its author can change.

    slots d/<doc>/<author>/<seq>   signed, immutable within an epoch
        -> the author's greatest complete epoch, in the order of seq
        -> updates of one pycrdt document under one client id -> items

A document is the set of its authors' parts, and a part is a pure function of the slots
held: whatever order, repetition or partition brought them, equal slots give equal
parts. A shared pycrdt document does not (research: replicated-state, section 1): two
updates under one (client, clock), or the exclusion of one author, leave replicas with
equal state vectors and different contents, or strand what honest authors wrote on top.
Here nothing refers to another author's structs, so the loss of one part harms no other.

*Epochs* bound a part. Once an epoch is full, or its first slots grow old, the author
writes the part anew (the base) under the next epoch into the other half of its slots;
until the base is complete everybody reads the epoch before.

Values are text: pycrdt gives integers back as floats.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from pycrdt import Doc, Map

from crdt_store.clock import wall_seconds
from crdt_store.documents.update_header import clients_of_untrusted
from crdt_store.entry import MAX_VALUE_BYTES, Entry
from fabric.core.codec import Codec
from fabric.core.digest import digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId

MAX_UPDATES = 128
"""Slots of one epoch; a part has twice as many, one half for each of two epochs."""
MAX_ITEMS = 256
"""Keys of one part that are read."""
MAX_KEY_CHARS = 200
MAX_TEXT_BYTES = 2048
MAX_EPOCH = 2**31
ROOT = "items"
"""The one map of the pycrdt document."""
_AT = re.compile(r"([0-9]{1,15}):")

Milliseconds = int


class Change(msgspec.Struct, frozen=True, array_like=True):
    """What one slot holds.

    Attributes:
        epoch: Of the part.
        base: Slots that make up the start of this epoch.
        update: A pycrdt update, encoding version 1.
    """

    epoch: Annotated[int, msgspec.Meta(ge=0, lt=MAX_EPOCH)]
    base: Annotated[int, msgspec.Meta(ge=0, le=MAX_UPDATES)]
    update: Annotated[bytes, msgspec.Meta(max_length=MAX_VALUE_BYTES)]


CHANGE: Codec[Change] = Codec(Change, max_bytes=MAX_VALUE_BYTES)


@dataclass(frozen=True, slots=True)
class Item:
    """One value of a document, and who says so.

    Attributes:
        key: What it is about.
        text: The value.
        author: Who wrote it; proven by the slot's signature.
        at: Wall milliseconds at which the author says it was set; never later than the
            slot that carries it.
    """

    key: str
    text: str
    author: PeerId
    at: Milliseconds

    @property
    def order(self) -> tuple[int, PeerId]:
        """The greatest is the last word where one is wanted."""
        return self.at, self.author


@lru_cache(maxsize=1024)
def client_id_of(author: bytes) -> int:
    """Return the one client id under which ``author`` writes."""
    return int.from_bytes(digest(b"fabric/document-client/1" + author)[:4], "big")


def seq_of(epoch: int, index: int) -> int:
    """Return which slot holds update ``index`` of ``epoch``."""
    return (epoch % 2) * MAX_UPDATES + index


@dataclass
class Part:
    """A part as the slots held make it.

    Attributes:
        items: By key.
        epoch: The one read.
        base: Slots that make up its start.
        used: Slots of that epoch up to the last one.
        expires_at: Wall seconds at which the first of them is void.
        next_epoch: One that no slot names yet.
        refused: What was left out, by reason.
        doc: The pycrdt document; for its author to go on writing.
    """

    items: dict[str, Item] = field(default_factory=dict)
    epoch: int = 0
    base: int = 0
    used: int = 0
    expires_at: float = math.inf
    next_epoch: int = 1
    refused: Counter[str] = field(default_factory=Counter)
    doc: Doc[Any] | None = None


def build_part(author: bytes, entries: Iterable[Entry]) -> Part:
    """Return the part that the slots of ``author`` in one document amount to.

    Never raises for what the slots hold; what is not as it should be is counted.
    """
    part = Part()
    epochs = _by_epoch(entries, part)
    whole = [epoch for epoch, slots in epochs.items() if _is_whole(slots)]
    part.refused["incomplete_epoch"] += sum(e > max(whole, default=-1) for e in epochs)
    part.epoch = max(whole, default=0)
    # never into the half that is being read, whatever was begun and not completed
    top = max(epochs, default=0)
    part.next_epoch = top + (1 if (top - part.epoch) % 2 == 0 else 2)
    _fill(part, author, epochs[part.epoch] if whole else {})
    part.refused = +part.refused
    return part


_Slots = dict[int, tuple[Entry, Change]]


def _by_epoch(entries: Iterable[Entry], part: Part) -> dict[int, _Slots]:
    epochs: dict[int, _Slots] = defaultdict(dict)
    for entry in entries:
        name = entry.key.rsplit("/", 1)[1]
        if not (name.isascii() and name.isdigit() and str(int(name[:9])) == name):
            part.refused["bad_key"] += 1
            continue
        try:
            change = CHANGE.decode_untrusted(entry.value)
        except RemoteProtocolError:
            part.refused["malformed"] += 1
            continue
        index = int(name) - seq_of(change.epoch, 0)
        if not 0 <= index < MAX_UPDATES:
            part.refused["bad_key"] += 1
            continue
        epochs[change.epoch][index] = (entry, change)
    return epochs


def _is_whole(slots: _Slots) -> bool:
    first = slots.get(0)
    if first is None:
        return False
    base = first[1].base
    return all(index in slots and slots[index][1].base == base for index in range(base))


def _fill(part: Part, author: bytes, slots: _Slots) -> None:
    client = client_id_of(author)
    doc: Doc[Any] = Doc(client_id=client)
    root: Map[Any] = doc.get(ROOT, type=Map)
    part.doc = doc
    touched: set[str] = set()
    watching = root.observe(lambda event: touched.update(_keys(event)))
    at: dict[str, Milliseconds] = {}
    for _, (entry, change) in sorted(slots.items()):
        touched.clear()
        if reason := _apply_untrusted(doc, change.update, client):
            part.refused[reason] += 1
        for key in touched:
            at[key] = int(wall_seconds(entry.hlc) * 1000)
    root.unobserve(watching)
    if slots:
        part.used, part.base = max(slots) + 1, slots[0][1].base
        part.expires_at = min(entry.expires_at for entry, _ in slots.values())
    peer = next((entry.peer for entry, _ in slots.values()), PeerId(""))
    for key in sorted(root.keys()):
        item = _item(key, root[key], peer, at.get(key, 0))
        if item is None:
            part.refused["bad_value"] += 1
        elif len(part.items) >= MAX_ITEMS:
            part.refused["too_many_items"] += 1
        else:
            part.items[key] = item


def _keys(event: Any) -> Iterable[str]:  # noqa: ANN401 - the library's has no types
    keys: Mapping[str, object] = event.keys
    return keys


def _item(key: str, value: object, peer: PeerId, at: Milliseconds) -> Item | None:
    stamped = _AT.match(value) if isinstance(value, str) else None
    if stamped is None or not 0 < len(key) <= MAX_KEY_CHARS:
        return None
    assert isinstance(value, str)
    text = value[stamped.end() :]
    if len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        return None
    return Item(key, text, peer, min(int(stamped[1]), at))


def _apply_untrusted(doc: Doc[Any], update: bytes, client: int) -> str:
    """Apply one update; return why it was left out, or an empty string.

    What it deletes of other clients has no effect: this document holds none of theirs.
    """
    try:
        clients = clients_of_untrusted(update)
    except RemoteProtocolError:
        return "malformed"
    if clients - {client}:
        return "foreign_client"
    try:
        doc.apply_update(update)
    except ValueError:
        return "malformed"
    except BaseException as exc:
        # a panic of the library below derives from BaseException; it is the update's
        if type(exc).__name__ != "PanicException":
            raise
        return "malformed"
    return ""
