"""Whom to dial, where and when: a pure core over addresses, connections and failures.

Every member should have a live connection while the mesh is small, in a larger one
those that ``neighbours.py`` chooses. What anybody says about a peer's addresses is
merged, never replaced: a record that lists only dead addresses must not hide one that
worked yesterday. A failed dial is tried again with exponential backoff; the last error
of each peer is kept, because "it does not connect and does not say why" is what users
complain about most.

Addresses are hints from anybody (``known_addrs.py``): whoever answers must prove that
it is the peer, and its admission is asked afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from fabric.app.known_addrs import HINTS, AddrBook, KnownAddr, Source
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 60.0
STRANGER_RETRY_SECONDS = 600.0
"""Longest wait for a peer that only hints speak of: it may not exist."""
HINT_RETRY_SECONDS = 5.0
"""A new hint brings the next dial no nearer than this to the last one: the network may
not make us dial at its rate."""
AWAY_FAILURES = 2
"""Dials in a row that failed, after which the return of a peer is news about others."""
MAX_PEERS = 1000


@dataclass
class Contact:
    """What we know about reaching one peer.

    Attributes:
        known: Its addresses with their history.
        sources: Who spoke of it.
        member: The mesh's records name it.
        failures: Dials in a row that failed.
        dialled_at: Monotonic seconds of the last dial's start.
        retry_at: Monotonic seconds before which it is not dialled again.
        last_error: Why the last dial or admission failed, or None.
        dialling: A dial is under way.
    """

    known: AddrBook
    sources: set[Source] = field(default_factory=set)
    member: bool = False
    failures: int = 0
    dialled_at: float = float("-inf")
    retry_at: float = 0.0
    last_error: FabricError | None = None
    dialling: bool = False

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs worth a dial, best first."""
        return self.known.best()

    @property
    def hearsay(self) -> bool:
        """Whether only hints speak of it and it never answered."""
        return not (self.member or self.known.ever_worked or self.sources - HINTS)


@dataclass
class PeerBook:
    """The contacts of one node.

    Attributes:
        own: Our id, never dialled.
        max_dials: Dials under way at once.
        chosen: The members to dial unasked; None: all.
        dropped: Peers for whom there was no room, or who made room, in all.
    """

    own: PeerId
    max_dials: int = 8
    chosen: frozenset[PeerId] | None = None
    contacts: dict[PeerId, Contact] = field(default_factory=dict)
    dropped: int = 0
    _random: random.Random = field(default_factory=random.Random)

    def learn(
        self,
        addrs: Mapping[PeerId, Iterable[str]],
        *,
        source: Source = "invite",
        wall: float = 0.0,
    ) -> None:
        """Merge what ``source`` says about the addresses of these peers.

        Args:
            addrs: Multiaddrs by peer, each peer's best first; bad ones are left out.
            source: Who says so. "record" names every current member.
            wall: Unix seconds.
        """
        if source == "record":
            for peer, held in self.contacts.items():
                held.member = peer in addrs
        for peer, found in addrs.items():
            contact = self._contact(peer)
            if contact is None:
                continue
            contact.sources.add(source)
            contact.member |= source == "record"
            if contact.known.merge(found, source, wall):
                # a new address deserves a try now
                soonest = contact.dialled_at + HINT_RETRY_SECONDS
                at = soonest if source in HINTS else 0.0
                contact.retry_at = min(contact.retry_at, at)

    def addrs_of(self, peer: PeerId) -> tuple[str, ...]:
        """Return the multiaddrs of ``peer`` worth a dial, best first."""
        contact = self.contacts.get(peer)
        return () if contact is None else contact.addrs

    def recall(self, remembered: Mapping[PeerId, Iterable[KnownAddr]]) -> None:
        """Take in what an earlier run of this peer knew."""
        for peer, known in remembered.items():
            contact = self._contact(peer)
            if contact is not None:
                contact.known.restore(known)
                contact.sources |= {addr.source for addr in known}

    def remembered(self) -> dict[PeerId, tuple[KnownAddr, ...]]:
        """Return what a later run should know; peers that are mere hearsay are not."""
        return {
            peer: contact.known.all()
            for peer, contact in self.contacts.items()
            if contact.addrs and not contact.hearsay
        }

    def _contact(self, peer: PeerId) -> Contact | None:
        """Return ``peer``'s contact, made if there is room; None for ourselves."""
        if peer == self.own:
            return None
        contact = self.contacts.get(peer)
        if contact is None and self._make_room():
            contact = self.contacts[peer] = Contact(AddrBook(peer))
        return contact

    def _make_room(self) -> bool:
        """Drop the contact that matters least if the book is full."""
        if len(self.contacts) < MAX_PEERS:
            return True
        self.dropped += 1
        idle = [
            (not c.hearsay, c.known.last_success, -c.failures, peer)
            for peer, c in self.contacts.items()
            if not (self._is_wanted(peer, c) or c.dialling)
        ]
        if idle:
            del self.contacts[min(idle)[-1]]
        return bool(idle)

    def due(self, now: float, connected: Iterable[PeerId]) -> list[PeerId]:
        """Return the peers to dial now, marked as dialling.

        Members come before hearsay, then the longest waiting. With as many connections
        as are chosen, only the chosen are dialled.
        """
        live = set(connected) | {self.own}
        enough = self.chosen is not None and len(live) > len(self.chosen)
        busy = sum(c.dialling for c in self.contacts.values())
        waiting = sorted(
            (c.hearsay, c.retry_at, peer)
            for peer, c in self.contacts.items()
            if peer not in live and c.addrs and not c.dialling and c.retry_at <= now
            if self._is_wanted(peer, c) or not (c.member or enough)
        )
        chosen = [peer for *_, peer in waiting[: max(0, self.max_dials - busy)]]
        for peer in chosen:
            self.contacts[peer].dialling = True
            self.contacts[peer].dialled_at = now
        return chosen

    def _is_wanted(self, peer: PeerId, contact: Contact) -> bool:
        return contact.member and (self.chosen is None or peer in self.chosen)

    def on_success(
        self, peer: PeerId, worked: Collection[str] = (), *, wall: float = 0.0
    ) -> None:
        """Note that ``peer`` is connected and has admitted us.

        Args:
            peer: Who.
            worked: The addresses at which it answered our dial; none if it dialled us.
            wall: Unix seconds.
        """
        contact = self.contacts.get(peer) or self._contact(peer)
        if contact is None:
            return
        contact.dialling = False
        contact.known.on_success(worked, wall)
        self._back(contact)

    def returned(self, ready: Iterable[PeerId]) -> None:
        """Note who is connected, perhaps by a dial of its own."""
        for peer in ready:
            contact = self.contacts.get(peer)
            if contact is not None and contact.failures and not contact.dialling:
                self._back(contact)

    def _back(self, contact: Contact) -> None:
        """Wait no longer for the other members if this one was away as they are.

        What ended may be a partition: then nobody should wait for a back-off that grew
        while it lasted.
        """
        was_away = contact.failures >= AWAY_FAILURES
        contact.failures = 0
        contact.retry_at = 0.0
        contact.last_error = None
        if was_away:
            self.retry_now(p for p, c in self.contacts.items() if c.member)

    def on_failure(
        self,
        peer: PeerId,
        error: FabricError,
        now: float,
        failed: Collection[str] = (),
    ) -> None:
        """Note why ``peer`` was not reached, and when to try again.

        Args:
            peer: Who.
            error: The answer, or that there was none.
            now: Monotonic seconds.
            failed: The addresses that did not answer.
        """
        contact = self.contacts.get(peer)
        if contact is None:
            return
        contact.dialling = False
        contact.failures += 1
        contact.last_error = error
        contact.known.on_failure(failed)
        bound = STRANGER_RETRY_SECONDS if contact.hearsay else MAX_RETRY_SECONDS
        longest = FIRST_RETRY_SECONDS * 2 ** min(contact.failures - 1, 16)
        jitter = self._random.uniform(0.5, 1.0)
        contact.retry_at = now + jitter * min(longest, bound)

    def retry_now(self, peers: Iterable[PeerId] | None = None) -> None:
        """Dial these peers (None: all) again at once: what kept them away has ended."""
        for peer in tuple(self.contacts) if peers is None else peers:
            if peer in self.contacts:
                self.contacts[peer].retry_at = 0.0

    def next_timeout(self, connected: Iterable[PeerId]) -> float | None:
        """Return when :meth:`due` may have something, or None."""
        live = set(connected) | {self.own}
        times = [
            c.retry_at
            for peer, c in self.contacts.items()
            if peer not in live and c.addrs and not c.dialling
            if self._is_wanted(peer, c) or not c.member
        ]
        return min(times) if times else None
