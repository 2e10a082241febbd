"""What the author of a part writes: the next slots, or the whole part anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pycrdt import Doc, Map, TransactionEvent

from crdt_store.documents.part import (
    CHANGE,
    MAX_ITEMS,
    MAX_KEY_CHARS,
    MAX_TEXT_BYTES,
    MAX_UPDATES,
    ROOT,
    Change,
    Milliseconds,
    Part,
    client_id_of,
    seq_of,
)
from fabric.core.errors import ConfigError, ResourceExhausted

_CHUNK_BYTES = 3000
"""Keys and values in one update; with the library's framing it fits a slot."""
MAX_PART_BYTES = 128 << 10
"""Keys and values of one part: a base takes at most 90 of an epoch's 128 slots, as two
neighbouring chunks hold more than one chunk's bytes."""

Edits = Mapping[str, str | None]
"""Text by key; None removes the key."""


def check_edits(edits: Edits) -> None:
    """Refuse what no reader would take.

    Raises:
        ConfigError: a key or text is too long.
    """
    for key, text in edits.items():
        if not 0 < len(key) <= MAX_KEY_CHARS:
            raise ConfigError(f"a key of {len(key)} characters > {MAX_KEY_CHARS}")
        size = len((text or "").encode())
        if size > MAX_TEXT_BYTES:
            raise ConfigError(
                f"a text of {size} B > {MAX_TEXT_BYTES} B",
                next_step="shorten it, or put it into the content store",
            )


def next_slots(
    part: Part, author: bytes, edits: Edits, now: Milliseconds, *, renew: bool = False
) -> list[tuple[int, bytes]]:
    """Return (seq, value) of the slots that bring ``edits`` into ``part``.

    Args:
        part: As built from our own slots.
        author: Our public key.
        edits: What to change.
        now: Wall milliseconds.
        renew: Begin a new epoch although there is room: the slots grow old.

    Raises:
        ConfigError: a key or text is too long.
        ResourceExhausted: the part would be too large.
    """
    check_edits(edits)
    stamped = {k: None if t is None else f"{now}:{t}" for k, t in edits.items()}
    chunks = list(_chunks(stamped))
    if not renew and part.used + len(chunks) <= MAX_UPDATES:
        assert part.doc is not None
        updates = _updates(part.doc, chunks)
        base, epoch, first = part.base, part.epoch, part.used
    else:
        updates = _rewritten(part, author, stamped)
        base, epoch, first = len(updates), part.next_epoch, 0
    _check_size(part, stamped)
    return [
        (seq_of(epoch, first + n), CHANGE.encode(Change(epoch, base, update)))
        for n, update in enumerate(updates)
    ]


def _rewritten(part: Part, author: bytes, stamped: Edits) -> list[bytes]:
    """Return the updates of a document that never held what was removed."""
    kept = {key: f"{item.at}:{item.text}" for key, item in part.items.items()}
    whole = {key: text for key, text in (kept | dict(stamped)).items() if text}
    return _updates(Doc(client_id=client_id_of(author)), list(_chunks(whole)) or [{}])


def _check_size(part: Part, stamped: Edits) -> None:
    sizes = {key: len(item.text.encode()) for key, item in part.items.items()}
    for key, text in stamped.items():
        sizes[key] = len((text or "").encode())
        if text is None:
            del sizes[key]
    total = sum(len(key.encode()) + size for key, size in sizes.items())
    if len(sizes) > MAX_ITEMS or total > MAX_PART_BYTES:
        raise ResourceExhausted(
            f"{len(sizes)} items of {total} B > {MAX_ITEMS} of {MAX_PART_BYTES} B",
            code="E_DOCUMENT_FULL",
            next_step="remove some of yours first",
        )


def _chunks(stamped: Edits) -> Iterator[dict[str, str | None]]:
    chunk: dict[str, str | None] = {}
    size = 0
    for key, text in sorted(stamped.items()):
        cost = len(key.encode()) + len((text or "").encode()) + 16
        if chunk and size + cost > _CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
        chunk[key] = text
        size += cost
    if chunk:
        yield chunk


def _updates(doc: Doc[Any], chunks: list[dict[str, str | None]]) -> list[bytes]:
    """Return the event update of each chunk.

    The event's, not ``get_update``: that repeats every deletion there ever was, and
    drops structs that wait for others.
    """
    root: Map[Any] = doc.get(ROOT, type=Map)
    found: list[bytes] = []

    def note(event: TransactionEvent) -> None:
        found.append(event.update)

    watching = doc.observe(note)
    empty = b"\x00\x00"
    for chunk in chunks:
        before = len(found)
        with doc.transaction():
            for key, text in chunk.items():
                if text is not None:
                    root[key] = text
                elif key in root:
                    del root[key]
        if len(found) == before:  # nothing changed, but the slot must be filled
            found.append(empty)
    doc.unobserve(watching)
    return found
