"""Whom to probe next: every member once per round, each round in another order.

So a ghost is probed by each member within two rounds, whatever the dice say
(SWIM, section 4.3).
"""

from __future__ import annotations

from collections.abc import Container
from random import Random

from fabric.core.ids import PeerId


class Rounds:
    """The members to probe, and where the present round stands."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._order: list[PeerId] = []
        self._cursor = 0
        self._left: set[PeerId] = set()
        self.members: set[PeerId] = set()

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, peer: object) -> bool:
        return peer in self.members

    def add(self, peer: PeerId) -> None:
        """Take ``peer`` in at a random place of what is left of the round."""
        known = peer in self.members or peer in self._left
        self.members.add(peer)
        if known and peer in self._order[self._cursor :]:
            return  # it left and came back within the round
        self._order.append(peer)
        at = self._rng.randint(self._cursor, len(self._order) - 1)
        self._order[at], self._order[-1] = self._order[-1], self._order[at]

    def remove(self, peer: PeerId) -> None:
        """Leave ``peer`` out from now on."""
        self.members.discard(peer)
        self._left.add(peer)

    def next(self, skipped: Container[PeerId]) -> PeerId | None:
        """Return the next member that is not ``skipped``; None if there is none."""
        for _ in range(2):  # the rest of this round, then a whole one
            while self._cursor < len(self._order):
                peer = self._order[self._cursor]
                self._cursor += 1
                if peer in self.members and peer not in skipped:
                    return peer
            self._order = sorted(self.members)
            self._rng.shuffle(self._order)
            self._cursor = 0
            self._left.clear()
        return None

    def sample(self, count: int, skipped: Container[PeerId]) -> list[PeerId]:
        """Return up to ``count`` random members that are not ``skipped``.

        Tries a bounded number of draws, so that it costs the same in a large mesh.
        """
        if len(self._order) <= 4 * count:
            fit = [p for p in sorted(self.members) if p not in skipped]
            return self._rng.sample(fit, min(count, len(fit)))
        found: dict[PeerId, None] = {}
        for _ in range(8 * count):
            peer = self._rng.choice(self._order)
            if peer in self.members and peer not in skipped:
                found[peer] = None
            if len(found) == count:
                break
        return list(found)
