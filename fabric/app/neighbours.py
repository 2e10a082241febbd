"""With which members to keep a standing connection: a pure core.

Up to ``max_neighbours`` other members: with all of them. Above, every peer stands on k
hash rings and keeps its next and its previous peer on each, so that

- both ends of a connection choose it, without a word, as long as they agree on who is
  there; nobody is chosen by more than 2k others;
- one ring alone connects everybody, and k rings in independent orders are a random
  2k-regular graph, which mixes in log N steps and stays whole without a third of it;
- who joins or leaves changes at most one choice per ring and neighbour: O(1) of all.

Whoever is not reached stays chosen, for it may be back, and the peers behind it on its
rings are chosen besides. Connections that nobody chose come about on demand; they are
closed, the longest idle first, when there are more than ``max_neighbours`` in all.

Sources: Suresh et al. 2018, Rapid (USENIX ATC), section 4: k-ring monitoring; Law and
Siu 2003, unions of random cycles are expanders; Stoica et al. 2001, Chord's successors.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Container, Mapping, Set
from itertools import chain, islice

from fabric.core.digest import long_digest
from fabric.core.ids import PeerId

POSITION_BYTES = 8
BOUND_FACTOR = 2
"""Above this many times ``max_neighbours`` nobody is asked before a connection ends."""
CROWDED_IDLE_SECONDS = 5.0
"""What counts as idle above that bound."""


class Rings:
    """Peers in k independent orders, each a circle; one serves a whole simulation.

    Args:
        num_rings: k.
    """

    def __init__(self, num_rings: int) -> None:
        self._num_rings = num_rings
        self._places: dict[PeerId, tuple[bytes, ...]] = {}
        self._rings: list[list[tuple[bytes, PeerId]]] = [[] for _ in range(num_rings)]

    def set_peers(self, peers: Set[PeerId]) -> None:
        """Hold exactly ``peers``."""
        for peer in self._places.keys() - peers:
            for ring, place in zip(self._rings, self._places.pop(peer), strict=True):
                del ring[bisect_left(ring, (place, peer))]
        for peer in peers - self._places.keys():
            places = self._places[peer] = self._places_of(peer)
            for ring, place in zip(self._rings, places, strict=True):
                insort(ring, (place, peer))

    def around(
        self, peer: PeerId, skipped: Container[PeerId] = frozenset()
    ) -> set[PeerId]:
        """Return the nearest on both sides of ``peer`` on each ring, not ``skipped``.

        ``peer`` itself need not stand on them.
        """
        found: set[PeerId] = set()
        for ring, place in zip(self._rings, self._places_of(peer), strict=True):
            at = bisect_left(ring, (place, peer))
            ahead = chain(range(at, len(ring)), range(at))
            behind = chain(range(at - 1, -1, -1), range(len(ring) - 1, at - 1, -1))
            for side in (ahead, behind):
                others = (other for i in side if (other := ring[i][1]) != peer)
                found.update(islice((o for o in others if o not in skipped), 1))
        return found

    def _places_of(self, peer: PeerId) -> tuple[bytes, ...]:
        known = self._places.get(peer)
        if known is not None:
            return known
        stream = long_digest(peer.encode(), POSITION_BYTES * self._num_rings)
        starts = range(0, len(stream), POSITION_BYTES)
        return tuple(stream[at : at + POSITION_BYTES] for at in starts)


class Neighbours:
    """Whom one peer keeps a connection with, and which others it may close.

    Args:
        own: Our id.
        max_neighbours: Standing connections; half as many rings.
    """

    def __init__(self, own: PeerId, max_neighbours: int) -> None:
        self.max_neighbours = max_neighbours
        self._rings = Rings(max_neighbours // 2)
        self._members: frozenset[PeerId] = frozenset()
        self._own = own

    @property
    def bounded(self) -> bool:
        """Whether there are more members than we keep connections with."""
        return len(self._members) > self.max_neighbours

    @property
    def members(self) -> frozenset[PeerId]:
        """All members but ourselves."""
        return self._members

    def set_members(self, members: Collection[PeerId]) -> None:
        """Choose among ``members``; those away for long should be left out."""
        wanted = frozenset(members) - {self._own}
        if wanted != self._members:
            self._members = wanted
            self._rings.set_peers(wanted if self.bounded else frozenset())

    def chosen(
        self,
        absent: Set[PeerId] = frozenset(),
        unreached: Set[PeerId] = frozenset(),
    ) -> frozenset[PeerId]:
        """Return with whom to have a connection.

        Args:
            absent: Members that are dead, as everybody finds.
            unreached: Members that we alone fail to reach: others take their places.
        """
        if not self.bounded:
            return self._members
        if len(self._members) - len(self._members & absent) <= self.max_neighbours:
            return self._members - absent
        chosen = self._rings.around(self._own, absent)
        if chosen & unreached:
            chosen |= self._rings.around(self._own, absent | unreached)
        return frozenset(chosen)

    def surplus(
        self, idle: Mapping[PeerId, float], chosen: Set[PeerId], patience: float
    ) -> list[PeerId]:
        """Return the connections to close now, the longest idle first.

        Args:
            idle: For how long each connection was of no use, in seconds; 0: in use.
            chosen: Whom to keep.
            patience: Seconds without use after which a connection may go.
        """
        too_many = len(idle) - self.max_neighbours
        if not self.bounded or too_many <= 0:
            return []
        if self.is_crowded(len(idle)):
            patience = min(patience, CROWDED_IDLE_SECONDS)
        spare = [(-seconds, peer) for peer, seconds in idle.items()]
        spare = [s for s in spare if s[1] not in chosen and -s[0] >= patience]
        return [peer for _, peer in sorted(spare)[:too_many]]

    def is_crowded(self, num_connections: int) -> bool:
        """Whether so many connections are closed without asking the other side."""
        return num_connections > BOUND_FACTOR * self.max_neighbours
