"""Who our neighbours are now, of what the store, liveness and the peer book know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import trio

from crdt_store.liveness.core import State
from crdt_store.service import Store
from fabric.app.neighbours import Neighbours
from fabric.app.peer_book import PeerBook
from fabric.app.roster import known_members
from fabric.core.ids import PeerId

UNREACHED_FAILURES = 2
"""After so many dials in vain others take a neighbour's places, besides it."""
REFRESH_SECONDS = 10.0
"""Rights end with time, which no watch tells."""

Reach = Literal["connected", "connecting", "on demand", "unreachable"]


class Neighbourhood:
    """The members, and which of them are our neighbours.

    Args:
        own: Our id.
        max_neighbours: Bound of standing connections.
        store: Who is a member, who is dead; is told whom to probe.
        book: Whom dials do not reach.
        connected: With whom there is an RPC connection.
        blocked: Whom we are cut off from on purpose.
    """

    def __init__(
        self,
        own: PeerId,
        max_neighbours: int,
        store: Store,
        book: PeerBook,
        connected: Callable[[], frozenset[PeerId]],
        blocked: Callable[[], frozenset[PeerId]],
    ) -> None:
        self.core = Neighbours(own, max_neighbours)
        self._own = own
        self._store = store
        self._book = book
        self._connected = connected
        self._blocked = blocked
        self._watch = store.members.watch()
        self._members: Mapping[PeerId, tuple[str, ...]] = {}
        self._fresh_until = 0.0
        self._before: frozenset[PeerId] = frozenset()
        store.liveness.neighbours = self.chosen

    async def run(self) -> None:
        """Follow the members until cancelled."""
        async for _ in self._watch:
            self._fresh_until = 0.0

    def members(self) -> Mapping[PeerId, tuple[str, ...]]:
        """Return the addresses of the members; the same object until they change."""
        now = trio.current_time()
        if now >= self._fresh_until:
            self._fresh_until = now + REFRESH_SECONDS
            found = known_members(self._store)
            if found != self._members:
                self._members = found
                self.core.set_members(found)
        return self._members

    def current(self) -> frozenset[PeerId]:
        """Return with whom to have a standing connection."""
        self.members()
        absent = self._store.liveness.dead() | self._blocked()
        failing = {peer for peer in self._before if self._fails(peer)}
        self._before = self.core.chosen(absent, failing - self._connected())
        return self._before

    def chosen(self) -> frozenset[PeerId] | None:
        """Return the neighbours; None while they are all members."""
        chosen = self.current()
        return chosen if self.core.bounded else None

    def _fails(self, peer: PeerId) -> bool:
        contact = self._book.contacts.get(peer)
        return contact is not None and contact.failures >= UNREACHED_FAILURES

    def on_demand(self) -> frozenset[PeerId]:
        """Return who is no neighbour, but there, and connected as soon as needed."""
        if not self.core.bounded:
            return frozenset()
        others = self.core.members - self.current() - self._connected()
        return frozenset(p for p in others if self._may_answer(p)) - self._blocked()

    def _may_answer(self, peer: PeerId) -> bool:
        """Whether neither liveness nor our last dial says that ``peer`` is away.

        Neighbours are dialled until they answer; of others an old failure says nothing.
        """
        contact = self._book.contacts.get(peer)
        failed = contact is not None and contact.last_error is not None
        if failed and contact is not None and peer not in self._before:
            failed = trio.current_time() < contact.retry_at
        return not (failed or self._store.liveness.state(peer) is State.DEAD)

    def reach_of(self, peer: PeerId) -> Reach:
        """Return how it stands with a connection to ``peer``."""
        if peer in self._connected():
            return "connected"
        if peer in self._blocked() or not self._may_answer(peer):
            return "unreachable"
        far = self.core.bounded and peer not in self._before
        return "on demand" if far else "connecting"
