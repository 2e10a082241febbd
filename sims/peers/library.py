"""Every entry of a run, decoded once and its signature verified once.

All peers of a run see the same bytes, so they share one :class:`Entry` per entry: a
thousand replicas then cost memory for places, not for copies, and a signature costs
its 111 us once instead of once per peer. Whether it is good is still decided by the
production code, on the bytes as received.
"""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import override

from crdt_store.entry import Entry, decode_entry_untrusted
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId


class SharedEntry(Entry, frozen=True):
    """An entry that remembers what is derived from it."""

    kept_peer: PeerId
    verdict: list[bool]
    """Empty until somebody asks."""

    @property
    @override
    def peer(self) -> PeerId:
        """The author's PeerId."""
        return self.kept_peer

    @override
    def signature_matches(self) -> bool:
        """Return whether the author signed these bytes: verified when first asked."""
        if not self.verdict:
            self.verdict.append(Entry.signature_matches(self))
        return self.verdict[0]


def share(entry: Entry) -> SharedEntry:
    """Return ``entry`` in the form that peers share."""
    plain = {name: getattr(entry, name) for name in Entry.__struct_fields__}
    return SharedEntry(**plain, kept_peer=entry.peer, verdict=[])


class Library:
    """Entries by their bytes.

    Attributes:
        num_offered: Entries that arrived at some peer.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, SharedEntry | None] = {}
        self.num_offered = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_verified(self) -> int:
        """How many signatures were verified."""
        return sum(1 for e in self._entries.values() if e is not None and e.verdict)

    def decode_untrusted(self, raws: Iterable[bytes]) -> tuple[list[Entry], int]:
        """Return the entries in ``raws``, and how many did not decode."""
        found: list[Entry] = []
        malformed = 0
        for raw in raws:
            self.num_offered += 1
            entry = self._entries.get(raw)
            if entry is None:
                entry = self._learn_untrusted(raw)
            if entry is None:
                malformed += 1
            else:
                found.append(entry)
        return found, malformed

    def _learn_untrusted(self, raw: bytes) -> SharedEntry | None:
        try:
            entry = share(decode_entry_untrusted(raw))
        except RemoteProtocolError:
            entry = None
        self._entries[raw] = entry
        return entry

    def signed(self, entry: Entry) -> SharedEntry:
        """Return the shared form of an ``entry`` that a peer of ours just signed."""
        shared = self._entries.get(entry.raw)
        if shared is None:
            shared = share(entry)
            self._entries[entry.raw] = shared
        return shared
