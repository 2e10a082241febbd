"""Gossip as the daemon's GossipSub spreads it: a flood over a mesh of few neighbours.

Each topic has a mesh in which everybody has about ``degree`` neighbours; who receives a
message for the first time forwards it once to the others of its neighbours. The
heartbeat that grafts new neighbours is faster (1 s) than anything that is measured
here, so a partition regrafts at once within each side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from fabric.net.config import GossipConfig
from sims.engine.queue import Engine
from sims.model.frames import GOSSIP_BYTES
from sims.model.network import Network


class Flood:
    """One message under way.

    Attributes:
        serial: Number of the message in this run.
        origin: Who published it.
        payload: What it carries.
        seen: Who had it.
        due: When the first copy on its way to each arrives.
    """

    __slots__ = ("due", "origin", "payload", "seen", "serial", "size")

    def __init__(self, serial: int, origin: int, payload: bytes, peers: int) -> None:
        self.serial = serial
        self.origin = origin
        self.payload = payload
        self.seen = bytearray(peers)
        self.due = [math.inf] * peers
        self.size = len(payload) + GOSSIP_BYTES


class Gossip:
    """The mesh of one topic.

    Args:
        engine: Virtual time.
        network: Links, and the faults of gossip.
        rng: Neighbours and faults.
        deliver: Called with (peer, message) for each delivery to a subscriber.
    """

    def __init__(
        self,
        engine: Engine,
        network: Network,
        rng: random.Random,
        deliver: Callable[[int, Flood], None],
    ) -> None:
        self._engine = engine
        self._network = network
        self._rng = rng
        self._deliver = deliver
        self._config = GossipConfig()
        self._neighbours: list[list[int]] = []
        self._epoch = -1
        self._grafted: set[int] = set()
        self.num_published = 0

    def publish(self, origin: int, payload: bytes) -> Flood:
        """Send ``payload`` to everybody who can be reached."""
        self._regraft()
        self.num_published += 1
        flood = Flood(self.num_published, origin, payload, len(self._neighbours))
        flood.seen[origin] = 1
        self._forward(flood, origin, origin)
        return flood

    def _forward(self, flood: Flood, holder: int, source: int) -> None:
        network, seen, due, size = self._network, flood.seen, flood.due, flood.size
        for neighbour in self._neighbours[holder]:
            if neighbour == source or neighbour >= len(seen):  # joined meanwhile
                continue
            network.count(holder, neighbour, "gossip", size)
            if not seen[neighbour]:
                when = self._engine.now + network.delay(holder, neighbour, size)
                if when < due[neighbour]:  # else an earlier copy is on its way
                    due[neighbour] = when
                    self._engine.at(when, self._arrive, flood, neighbour, holder)

    def _arrive(self, flood: Flood, peer: int, source: int) -> None:
        if flood.seen[peer] or not self._network.linked(source, peer):
            return
        flood.seen[peer] = 1
        terms, rng = self._network.terms, self._rng
        if terms.drop and rng.random() < terms.drop:
            return
        copies = 1 + (terms.duplicate > 0 and rng.random() < terms.duplicate)
        for _ in range(copies):
            if terms.reorder and rng.random() < terms.reorder:
                late = rng.random() * terms.reorder_seconds
                self._engine.after(late, self._hand_over, peer, flood)
            else:
                self._deliver(peer, flood)
        self._regraft()
        self._forward(flood, peer, source)

    def _hand_over(self, peer: int, flood: Flood) -> None:
        if self._network.online[peer]:
            self._deliver(peer, flood)

    # --- the mesh

    def _regraft(self) -> None:
        network = self._network
        if self._epoch == network.epoch:
            return
        self._epoch = network.epoch
        while len(self._neighbours) < len(network.online):
            self._neighbours.append([])
        for peer, neighbours in enumerate(self._neighbours):
            kept = [n for n in neighbours if network.linked(peer, n)]
            self._neighbours[peer] = kept
        sides: dict[int, list[int]] = {}
        for peer, online in enumerate(network.online):
            if online:
                sides.setdefault(network.side[peer], []).append(peer)
        for members in sides.values():
            self._graft(members)

    def _graft(self, members: list[int]) -> None:
        config, neighbours = self._config, self._neighbours
        for peer in members:
            mine = neighbours[peer]
            # a newcomer takes its full share; later only a lack is made good
            enough = config.degree_low if peer in self._grafted else config.degree
            self._grafted.add(peer)
            if len(mine) >= min(enough, len(members) - 1):
                continue
            wanted = min(config.degree, len(members) - 1)
            draws = min(len(members), 8 * wanted)  # enough; a thin mesh still works
            for other in self._rng.sample(members, draws):
                room = len(neighbours[other]) < config.degree_high
                fit = other not in mine and self._network.linked(peer, other)
                if other != peer and room and fit:
                    mine.append(other)
                    neighbours[other].append(peer)
                if len(mine) >= wanted:
                    break
