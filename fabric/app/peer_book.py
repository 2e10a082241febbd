"""Whom to dial and when: a pure core over addresses, connections and failures.

Every member should have a live connection while the mesh is small. A failed dial is
tried again with exponential backoff; the last error of each peer is kept, because "it
does not connect and does not say why" is what users complain about most.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 60.0
MAX_ADDRS = 16
"""Addresses kept per peer; a host announces a handful."""


@dataclass
class Contact:
    """What we know about reaching one peer.

    Attributes:
        addrs: Multiaddrs, newest first.
        failures: Dials in a row that failed.
        retry_at: Monotonic seconds before which it is not dialled again.
        last_error: Why the last dial or admission failed, or None.
        dialling: A dial is under way.
    """

    addrs: tuple[str, ...] = ()
    failures: int = 0
    retry_at: float = 0.0
    last_error: FabricError | None = None
    dialling: bool = False


@dataclass
class PeerBook:
    """The contacts of one node.

    Attributes:
        own: Our id, never dialled.
        max_dials: Dials under way at once.
    """

    own: PeerId
    max_dials: int = 8
    contacts: dict[PeerId, Contact] = field(default_factory=dict)
    _random: random.Random = field(default_factory=random.Random)

    def learn(self, addrs: Mapping[PeerId, Iterable[str]]) -> None:
        """Replace what is known about the addresses of these peers."""
        for peer, found in addrs.items():
            known = tuple(found)[:MAX_ADDRS]
            contact = self.contacts.setdefault(peer, Contact())
            if known and known != contact.addrs:
                contact.addrs = known
                contact.retry_at = 0.0  # a new address deserves a try now

    def due(self, now: float, connected: Iterable[PeerId]) -> list[PeerId]:
        """Return the peers to dial now, longest waiting first; marks them dialling."""
        live = set(connected) | {self.own}
        busy = sum(c.dialling for c in self.contacts.values())
        waiting = sorted(
            (c.retry_at, peer)
            for peer, c in self.contacts.items()
            if peer not in live and c.addrs and not c.dialling and c.retry_at <= now
        )
        chosen = [peer for _, peer in waiting[: max(0, self.max_dials - busy)]]
        for peer in chosen:
            self.contacts[peer].dialling = True
        return chosen

    def on_success(self, peer: PeerId) -> None:
        """Note that ``peer`` is connected and has admitted us."""
        contact = self.contacts.setdefault(peer, Contact())
        contact.dialling = False
        contact.failures = 0
        contact.retry_at = 0.0
        contact.last_error = None

    def on_failure(self, peer: PeerId, error: FabricError, now: float) -> None:
        """Note why ``peer`` was not reached, and when to try again."""
        contact = self.contacts.setdefault(peer, Contact())
        contact.dialling = False
        contact.failures += 1
        contact.last_error = error
        longest = FIRST_RETRY_SECONDS * 2 ** min(contact.failures - 1, 16)
        jitter = self._random.uniform(0.5, 1.0)
        contact.retry_at = now + jitter * min(longest, MAX_RETRY_SECONDS)

    def retry_now(self, peers: Iterable[PeerId]) -> None:
        """Dial these peers again without waiting: what kept them away has ended."""
        for peer in peers:
            if peer in self.contacts:
                self.contacts[peer].retry_at = 0.0

    def next_timeout(self, connected: Iterable[PeerId]) -> float | None:
        """Return when :meth:`due` may have something, or None."""
        live = set(connected) | {self.own}
        times = [
            c.retry_at
            for peer, c in self.contacts.items()
            if peer not in live and c.addrs and not c.dialling
        ]
        return min(times) if times else None

    def forget(self, members: Iterable[PeerId]) -> None:
        """Drop the contacts that are neither members nor being dialled."""
        keep = set(members)
        for peer in [p for p, c in self.contacts.items() if p not in keep]:
            if not self.contacts[peer].dialling:
                del self.contacts[peer]
