"""When to announce which root: pure, driven by ``now``.

Roots only, never blocks, and at most one announcement per ``PACE_SECONDS``: peers of
py-libp2p accept 10 ADD_PROVIDER per 10 s from one peer and drop the rest silently.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from fabric.core.ids import BlobId, PeerId

PACE_SECONDS = 1.5
RETRY_SECONDS = 60.0
"""Wait after an announcement that nobody stored."""
MAX_PROVIDERS = 20
"""Records looked up for one root: Kademlia's k."""


@dataclass
class Announcements:
    """The roots we hold and when each is announced next.

    Attributes:
        interval: Seconds between two announcements of one root.
        rng: Spreads them.
    """

    interval: float
    rng: random.Random
    _due: dict[BlobId, float] = field(default_factory=dict)
    _pace_until: float = 0.0

    def add(self, root: BlobId, now: float) -> None:
        """Announce ``root`` as soon as the pace allows."""
        self._due.setdefault(root, now)

    def remove(self, root: BlobId) -> None:
        """Announce ``root`` no more; its records lapse by themselves."""
        self._due.pop(root, None)

    def pace(self, now: float) -> float:
        """Return the seconds to wait before the announcement now wanted; books it."""
        start = max(now, self._pace_until)
        self._pace_until = start + PACE_SECONDS
        return start - now

    def next_root(self, now: float) -> BlobId | None:
        """Return the root due for longest, or None. Report :meth:`on_announced`."""
        due = [(at, root) for root, at in self._due.items() if at <= now]
        return min(due)[1] if due else None

    def on_announced(self, root: BlobId, num_stored: int, now: float) -> None:
        """Plan the next announcement of ``root``, soon if nobody stored this one."""
        if root in self._due:
            wait = self.interval if num_stored else min(RETRY_SECONDS, self.interval)
            self._due[root] = now + wait * self.rng.uniform(0.9, 1.1)

    def next_timeout(self) -> float | None:
        """Return when :meth:`next_root` has something, or None."""
        return min(self._due.values(), default=None)


def usable_providers(
    given: Iterable[PeerId], found: Iterable[PeerId], own: PeerId
) -> list[PeerId]:
    """Return each provider once, those the caller named first, without ourselves."""
    return [p for p in dict.fromkeys([*given, *found]) if p != own]
