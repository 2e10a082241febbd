"""The chain of root keys of a mesh: who is root now, and what earlier roots signed.

    mesh.root --succession--> root 2 --succession--> root 3 (the present one)

The id of a mesh is that of its first root, so a rotation changes no member's files. A
succession voids whatever its signer signed besides what it lists and itself; so where
it is held a second one by the same key cannot enter, and a root key that leaks *after*
its rotation is worth nothing. Against a key stolen before, nothing in a mesh helps: its
holder can do all that the root can. Then make a new mesh.
"""

from __future__ import annotations

from crdt_store.entry import Entry
from crdt_store.grants import KEPT_ID_BYTES, AuthorityRecord, Succession
from fabric.core.ids import PeerId


class Roots:
    """Which keys were root, in order.

    Args:
        first: The root in the mesh's name.
    """

    def __init__(self, first: PeerId) -> None:
        self._first = first
        self._next: dict[PeerId, AuthorityRecord] = {}

    @property
    def present(self) -> PeerId:
        """The root that may sign now."""
        return self._chain()[-1]

    def _chain(self) -> list[PeerId]:
        chain = [self._first]
        while (record := self._next.get(chain[-1])) and record.subject not in chain:
            chain.append(record.subject)
        return chain

    def signed(self, entry: Entry) -> bool:
        """Return whether a root validly signed ``entry``."""
        signer = entry.peer
        if signer not in self._chain():
            return False
        record = self._next.get(signer)
        if record is None or record.entry.id == entry.id:
            return True
        succession = record.record
        assert isinstance(succession, Succession)
        return entry.id[:KEPT_ID_BYTES] in succession.kept

    def add(self, record: AuthorityRecord) -> None:
        """Take in a valid succession."""
        self._next[record.entry.peer] = record

    def remove(self, record: AuthorityRecord) -> None:
        """Forget a succession."""
        held = self._next.get(record.entry.peer)
        if held is not None and held.entry.id == record.entry.id:
            del self._next[record.entry.peer]
