"""Agreeing on who is absent, in a mesh where each peer probes its neighbours only.

With few members everybody probes everybody, and who missed the news of a death finds
out. With neighbours that is not so. Each message therefore bears a mark of whom its
sender takes for dead; who hears other marks again and again asks for the list:

    it names somebody who is alive here      a suspicion starts, as with news
    it leaves out somebody who is dead here  we ask that peer itself, some at a time
    and most of the mesh is dead here        we were cut off: believe as newcomers do
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from random import Random

from crdt_store.liveness.beliefs import Beliefs
from crdt_store.liveness.messages import MAX_INTRODUCED, MAX_MARK, Claim, Standing
from crdt_store.liveness.rounds import Rounds
from fabric.core.digest import digest
from fabric.core.ids import PeerId

LIST_SECONDS = 30.0
"""The list of the absent is asked for no more often."""
DIFFERENCES = 3
"""News on its way makes marks differ for a moment; so many in a row do not."""


class Accord:
    """What this peer does to believe of the absent what its neighbours believe.

    Args:
        beliefs: Ours.
        rng: Order of probes.

    Attributes:
        near: Whom to probe: the neighbours, or all members.
    """

    def __init__(self, beliefs: Beliefs, rng: Random) -> None:
        self.near = beliefs.rounds
        self._beliefs = beliefs
        self._rng = rng
        self._differences = 0
        self._next_list = 0.0
        self._disputed: dict[PeerId, None] = {}
        self._marked: tuple[frozenset[PeerId], int] = (frozenset(), 1)

    @property
    def _bounded(self) -> bool:
        return self.near is not self._beliefs.rounds

    def set_neighbours(self, peers: Collection[PeerId] | None) -> None:
        """Probe these members only; None: all."""
        if peers is None:
            self.near = self._beliefs.rounds
            return
        if not self._bounded:
            self.near = Rounds(self._rng)
        wanted = self._beliefs.rounds.members.intersection(peers)
        for peer in self.near.members - wanted:
            self.near.remove(peer)
        for peer in sorted(wanted - self.near.members):
            self.near.add(peer)

    def forget(self, peer: PeerId) -> None:
        """``peer`` is no member any more."""
        self.near.remove(peer)
        self._disputed.pop(peer, None)

    def mark(self) -> int:
        """Return a hash of whom we take for dead; 0 while everybody probes everybody"""
        if not self._bounded:
            return 0
        dead = self._beliefs.dead.keys()
        if self._marked[0] != dead:
            mark = 0
            for peer in dead:
                mark ^= int.from_bytes(digest(peer.encode())[:4], "big")
            self._marked = frozenset(dead), 1 + mark % MAX_MARK
        return self._marked[1]

    def compare(self, theirs: int) -> None:
        """A member bears the mark ``theirs``."""
        ours = self.mark()
        if ours and theirs:
            self._differences = 0 if ours == theirs else self._differences + 1

    def wants_list(self, now: float) -> bool:
        """Whether to ask for the list with the next message; then not for a while."""
        if not self._bounded or now < self._next_list:
            return False
        if self._differences < DIFFERENCES and not self._beliefs.has_unknown:
            return False
        self._next_list = now + LIST_SECONDS
        self._differences = 0
        return True

    def hear_list(self, claims: Iterable[Claim]) -> None:
        """A neighbour named the absent; whom it names is suspected here already."""
        self._beliefs.assume_alive()
        named = {claim.subject for claim in claims if claim.standing is Standing.DEAD}
        if not self._bounded or len(named) >= MAX_INTRODUCED:
            return  # there may be more than it named
        dead = self._beliefs.dead.keys()
        disputed = dead - named
        if 2 * len(dead) > len(self._beliefs.rounds):
            self._beliefs.pardon(disputed)
        else:
            self._disputed.update(dict.fromkeys(sorted(disputed)))

    def take_disputed(self, count: int) -> list[PeerId]:
        """Return up to ``count`` peers to ask: dead here, alive for a neighbour."""
        found: list[PeerId] = []
        while self._disputed and len(found) < count:
            peer = next(iter(self._disputed))
            del self._disputed[peer]
            if peer in self._beliefs.dead:
                found.append(peer)
        return found
