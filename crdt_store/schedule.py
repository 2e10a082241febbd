"""With whom to reconcile, and when: the same object in a daemon and in a simulation.

A fresh connection is reconciled at once, because it may end a partition; if it brought
news, so are a few others, who may have no connection of their own to the other side.
Beyond that,
one random partner per period of max(5 s, N x 30 ms): everybody starts one session per
period and on average answers one, and the period grows with the mesh, so that neither
idle traffic nor the time to reach everybody explodes with its size.
"""

from __future__ import annotations

import random
from collections.abc import Set as AbstractSet

from crdt_store.config import StoreConfig
from fabric.core.ids import PeerId

ECHOES = 3
"""Partners that are told what a fresh connection brought: rounds do the rest."""
MAX_RUNNING = 4
"""Sessions at once: after a mass reconnect the rest wait until one ended."""


class SyncSchedule:
    """Chooses partners; told what is connected and which sessions ended.

    Ask :meth:`due` when connections changed, when a session ended and at
    :attr:`next_round`; asking more often does no harm.

    Args:
        config: Periods.
        rng: Chooses partners, and a part of a period to add to the first: peers that
            were started together must not all reconcile at the same moments for ever.
        now: Monotonic seconds, as everywhere here.
        num_members: Of the mesh, as far as known.
    """

    def __init__(
        self, config: StoreConfig, rng: random.Random, now: float, num_members: int
    ) -> None:
        self._config = config
        self._rng = rng
        self._seen: frozenset[PeerId] = frozenset()
        self._running: set[PeerId] = set()
        self._fresh: set[PeerId] = set()
        self._echoes = 0
        self._told: set[PeerId] = set()
        self.next_round = now + (1 + rng.random()) * self.period(num_members)

    def period(self, num_members: int) -> float:
        """Return the seconds between two rounds in a mesh of ``num_members``."""
        grown = num_members * self._config.sync_seconds_per_member
        return max(self._config.sync_period_seconds, grown)

    def due(
        self, now: float, connected: AbstractSet[PeerId], num_members: int
    ) -> list[PeerId]:
        """Return the partners to start a session with now; each counts as running."""
        chosen: list[PeerId] = []
        self._seen &= connected
        for peer in sorted(connected - self._seen):
            if not self._has_room():
                break
            self._seen |= {peer}
            if peer not in self._running:
                self._fresh.add(peer)
                chosen.append(self._begin(peer))
        while self._echoes and self._has_room():
            ignorant = sorted(connected - self._running - self._told)
            self._echoes = self._echoes - 1 if ignorant else 0
            if ignorant:
                partner = self._rng.choice(ignorant)
                self._told.add(partner)
                chosen.append(self._begin(partner))
        if now >= self.next_round:
            self.next_round = now + self.period(num_members)
            idle = sorted(connected - self._running)
            if idle and self._has_room():
                chosen.append(self._begin(self._rng.choice(idle)))
        return chosen

    def _has_room(self) -> bool:
        return len(self._running) < MAX_RUNNING

    def _begin(self, peer: PeerId) -> PeerId:
        self._running.add(peer)
        return peer

    def began(self, peer: PeerId) -> None:
        """Note a session that somebody else asked for."""
        self._running.add(peer)

    def ended(self, peer: PeerId, *, news: bool = False) -> None:
        """Note that the session with ``peer`` is over, however it ended.

        Args:
            peer: The partner.
            news: It brought something that we did not hold.
        """
        self._running.discard(peer)
        if peer in self._fresh:
            self._fresh.discard(peer)
            if news:
                self._echoes, self._told = ECHOES, {peer}
