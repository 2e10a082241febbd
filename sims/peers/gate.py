"""The gate of every peer: who knows that somebody was revoked has no session with it.

In a daemon the gate asks the store whether a peer is a member, for each session and
again when the store changes. So a revoked peer loses one connection after the other, as
the news spreads, and keeps those with peers that have not heard of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sims.engine.event_log import EventLog
from sims.model.network import Network
from sims.peers.node import Node


class Gate:
    """Who has no connection with whom because one of them was revoked.

    Args:
        network: Where connections end.
        log: Of events.
    """

    def __init__(self, network: Network, log: EventLog) -> None:
        self._network = network
        self._log = log
        self._revoked: list[Node] = []
        self._asked: dict[tuple[int, int], int] = {}

    def watch(self, node: Node) -> None:
        """Note that somebody signed a revocation of ``node``, which will go round."""
        self._revoked.append(node)

    def look(self, nodes: Sequence[Node], now: float) -> list[tuple[Node, Node]]:
        """Have each of ``nodes`` refuse whom it knows to be revoked.

        Returns:
            Who refuses whom since the last call.
        """
        found: list[tuple[Node, Node]] = []
        for revoked in self._revoked:
            others = [node for node in nodes if node is not revoked]
            new = [node for node in others if self._refuses(node, revoked, now)]
            found += [(node, revoked) for node in new]
            for node in new:
                self._network.bar(node.number, revoked.number)
                self._log.write(now, f"bar {node.number} {revoked.number}")
            revoked.barred = all(
                self._network.barred(node.number, revoked.number)
                for node in others
                if self._network.online[node.number]
            )
        return found

    def _refuses(self, node: Node, revoked: Node, now: float) -> bool:
        """Return whether ``node`` knows now, and did not before."""
        pair = node.number, revoked.number
        if self._network.barred(*pair) or self._asked.get(pair) == node.version:
            return False
        self._asked[pair] = node.version
        authority = node.replica.authority
        decision = authority.membership(revoked.peer, node.wall(now))
        return decision.code == "E_REVOKED"
