"""A partition of ten replicas heals, in virtual time, by the daemon's own schedule."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator

from benchmarks.store_contestants import Contestant
from crdt_store.config import StoreConfig
from crdt_store.schedule import SyncSchedule
from fabric.core.ids import PeerId

NUM_REPLICAS = 10
SHARED = 500
"""Entries everybody has before the cut."""
WRITTEN = 100
"""Entries written on either side of it."""


class Heal:
    """Sessions of all replicas, interleaved round trip by round trip.

    Attributes:
        num_bytes: Payload of all sessions, both ways.
        seconds: Virtual time from the heal to convergence.
    """

    def __init__(self, replicas: list[Contestant], seed: int) -> None:
        self._rng = random.Random(seed)
        self._replicas = replicas
        self._peers = [PeerId(f"{n:02}") for n in range(len(replicas))]
        self._schedules = [
            SyncSchedule(StoreConfig(), random.Random(seed + n), 0.0, len(replicas))
            for n in range(len(replicas))
        ]
        self._serial = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.now = self.seconds = 0.0
        self.num_bytes = 0

    def run(self) -> None:
        """Run until all replicas hold the same, and say when that was."""
        for number, schedule in enumerate(self._schedules):
            side = range(5) if number < 5 else range(5, 10)
            connected = {self._peers[n] for n in side}
            # reconciled during the partition: only the other side is fresh
            while known := schedule.due(0.0, connected, len(self._replicas)):
                for peer in known:
                    schedule.ended(peer)
            self._at(self._rng.random(), lambda n=number: self._poll(n))
        while not self._converged():
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.seconds = self.now

    def _converged(self) -> bool:
        first = self._replicas[0].digest()
        return all(other.digest() == first for other in self._replicas[1:])

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._serial), action))

    def _poll(self, number: int) -> None:
        everybody = set(self._peers) - {self._peers[number]}
        for peer in self._schedules[number].due(
            self.now, everybody, len(everybody) + 1
        ):
            partner = self._replicas[int(peer)]
            self._step(number, peer, self._replicas[number].sync(partner))
        self._at(self.now + 1.0, lambda: self._poll(number))

    def _step(self, number: int, peer: PeerId, session: Iterator[int]) -> None:
        moved = next(session, None)
        if moved is None:
            self._schedules[number].ended(peer)
            return
        self.num_bytes += moved
        later = self.now + self._rng.uniform(0.02, 0.08)
        self._at(later, lambda: self._step(number, peer, session))


def healed(kind, seed: int) -> tuple[Heal, int]:
    """Return a finished heal and the optimum: each missing update sent once."""
    replicas = [kind(n) for n in range(NUM_REPLICAS)]
    shared = [replicas[n % NUM_REPLICAS].write(n) for n in range(SHARED)]
    for replica in replicas:
        replica.take(shared)
    optimum = 0
    for side in (0, 5):
        members = replicas[side : side + 5]
        first = SHARED + side * WRITTEN
        written = [members[n % 5].write(first + n) for n in range(WRITTEN)]
        for member in members:
            member.take(written)
        optimum += 5 * sum(map(len, written))
    heal = Heal(replicas, seed)
    heal.run()
    return heal, optimum
