"""What was acknowledged, and whether all peers still have it: the judge of a run."""

from __future__ import annotations

from crdt_store.entry import Entry, Slot
from sims.peers.node import Node

_TRACKED = 64
"""Writes whose way to everybody is followed at a time."""


def state_hash(node: Node) -> bytes:
    """Return a hash that is equal on replicas that offer the same entries."""
    trees = (node.replica.index(authority=a) for a in (True, False))
    return b"".join(tree.fingerprint() for tree in trees)


class Ledger:
    """Remembers the newest acknowledged write of each slot.

    Attributes:
        num_acknowledged: Writes on their author's disk.
        spread_seconds: Of each tracked write: how long it took to reach everybody.
    """

    def __init__(self) -> None:
        self._newest: dict[Slot, Entry] = {}
        self._under_way: list[tuple[float, Entry]] = []
        self._hashes: dict[int, tuple[int, bytes]] = {}
        self.num_acknowledged = 0
        self.spread_seconds: list[float] = []

    def acknowledge(self, entry: Entry, now: float) -> None:
        """Note that its author was told that ``entry`` is safe."""
        self.num_acknowledged += 1
        held = self._newest.get(entry.slot)
        if held is None or entry.order > held.order:
            self._newest[entry.slot] = entry
        if len(self._under_way) < _TRACKED:
            self._under_way.append((now, entry))

    def lost(self, node: Node, now: float) -> list[Entry]:
        """Return the acknowledged writes that ``node`` should hold and does not.

        What expired, and what a revocation voids, is not lost.
        """
        return [
            entry
            for entry in self._newest.values()
            if not _has(node, entry)
            and entry.expires_at > node.wall(now)
            and not node.replica.authority.refusal(entry)
        ]

    def agreeing(self, nodes: list[Node]) -> int:
        """Return how many of ``nodes`` hold the state that most of them hold."""
        votes: dict[bytes, int] = {}
        for node in nodes:
            found = self._hash(node)
            votes[found] = votes.get(found, 0) + 1
        return max(votes.values(), default=0)

    def _hash(self, node: Node) -> bytes:
        version, found = self._hashes.get(node.number, (-1, b""))
        if version != node.version:
            found = state_hash(node)
            self._hashes[node.number] = node.version, found
        return found

    def staleness(self, nodes: list[Node], now: float) -> float:
        """Return the age of the oldest tracked write that one of ``nodes`` lacks."""
        waiting: list[tuple[float, Entry]] = []
        for since, entry in self._under_way:
            if all(_has(node, entry) for node in nodes):
                self.spread_seconds.append(now - since)
            else:
                waiting.append((since, entry))
        self._under_way = waiting
        return max((now - since for since, _ in waiting), default=0.0)


def _has(node: Node, entry: Entry) -> bool:
    held = node.replica.slots.get(entry.slot)
    return held is not None and held.order >= entry.order
