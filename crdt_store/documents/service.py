"""The table of documents: read everybody's parts, edit our own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import trio

from crdt_store.documents.part import Item, Part, build_part
from crdt_store.documents.writing import Edits, next_slots
from crdt_store.entry import Entry
from crdt_store.slots import Slots
from crdt_store.views import DAY_SECONDS, Put, View, Watch, segment
from fabric.core.ids import PeerId, public_key_of
from fabric.core.telemetry import Counters

DOCUMENT_TTL_SECONDS = 7 * DAY_SECONDS
"""As long as the spec of the job it belongs to."""
_MAX_CACHED = 256


class Documents(View):
    """Documents by name; each author writes a part of its own.

    Args:
        slots: The winners held.
        put: Writes a slot of ours.
        watch: Makes a watch of tables by name.
        me: Our PeerId.
        clock: Wall seconds.
        counters: What parts of others leave out, by reason.
    """

    table = "d"

    def __init__(
        self,
        slots: Slots,
        put: Put,
        watch: Callable[..., Watch],
        me: PeerId,
        *,
        clock: Callable[[], float],
        counters: Counters,
    ) -> None:
        super().__init__(slots, put, watch, me)
        self._clock = clock
        self._counters = counters
        self._turn = trio.Lock()  # two edits at once would take one slot
        self._built: dict[tuple[str, bytes], tuple[frozenset[bytes], Part]] = {}

    def read(self, name: str) -> tuple[Item, ...]:
        """Return every authorised author's items of the document, by (key, author)."""
        by_author: defaultdict[bytes, list[Entry]] = defaultdict(list)
        for entry in self._slots.under(f"d/{segment(name)}/"):
            by_author[entry.author].append(entry)
        items = [
            item
            for author, entries in by_author.items()
            for item in self._part(name, author, entries).items.values()
        ]
        return tuple(sorted(items, key=lambda item: (item.key, item.author)))

    def _part(self, name: str, author: bytes, entries: list[Entry]) -> Part:
        """Return a part; built anew only when its slots are others than before."""
        ids = frozenset(entry.id for entry in entries)
        held = self._built.pop((name, author), None)
        if held is None or held[0] != ids:
            held = (ids, build_part(author, entries))
            for reason, count in held[1].refused.items():
                self._counters.add("documents_refused_total", count, label=reason)
        while len(self._built) >= _MAX_CACHED:
            del self._built[next(iter(self._built))]
        self._built[name, author] = held
        return held[1]

    async def edit(self, name: str, edits: Edits) -> None:
        """Change our part of the document; return once that is on disk.

        After cancellation a beginning of the edits may have been made.

        Raises:
            ConfigError: a key or text is too long.
            ResourceExhausted: our part is full, or the disk is.
            RemoteRefused: the mesh does not let this peer write documents.
        """
        prefix = f"d/{segment(name)}/{self._me}/"
        async with self._turn:
            now = self._clock()
            own = [e for e in self._slots.under(prefix) if e.peer == self._me]
            part = build_part(public_key_of(self._me), own)
            # the first slots must not expire under the later ones
            old = part.expires_at - now < DOCUMENT_TTL_SECONDS / 2
            slots = next_slots(
                part, public_key_of(self._me), edits, int(now * 1000), renew=old
            )
            for seq, value in slots:
                await self._put(f"{prefix}{seq}", value, DOCUMENT_TTL_SECONDS)
