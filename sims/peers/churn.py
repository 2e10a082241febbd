"""Peers that come and go, as people switch machines on and off."""

from __future__ import annotations

import random
from collections.abc import Callable

from crdt_store.views import MEMBER_TTL_SECONDS
from sims.engine.queue import Engine
from sims.model.scenario import Scenario
from sims.peers.founding import member_record
from sims.peers.mesh import Mesh
from sims.peers.node import Node

_REFRESH_SECONDS = MEMBER_TTL_SECONDS / 4
"""As the roster does."""
_WEIBULL_SHAPE = 0.5
_WEIBULL_MEAN = 2.0
"""Mean of the Weibull distribution with scale 1 and that shape: gamma(1 + 1/shape)."""


class Churn:
    """Ends and restarts peers, and has them tell the mesh as the daemon does.

    Args:
        scenario: How often.
        engine: Virtual time.
        mesh: The peers; the first one, its owner, stays.
        rng: Who and for how long.
        kill: Ends a peer.
        restart: Brings it back from its disk.
    """

    def __init__(
        self,
        scenario: Scenario,
        engine: Engine,
        mesh: Mesh,
        rng: random.Random,
        kill: Callable[[Node], None],
        restart: Callable[[Node], None],
    ) -> None:
        self._terms = scenario.churn
        self._end = scenario.fault_seconds
        self._refresh = scenario.writes.refresh
        self._engine = engine
        self._mesh = mesh
        self._rng = rng
        self._kill = kill
        self._restart = restart
        self._ends: dict[int, float] = {}
        self._incarnations: dict[int, int] = {}
        self._leaving = True

    def plan(self) -> None:
        """Put joins, leaves and refreshes on the queue."""
        terms, engine = self._terms, self._engine
        for node in self._mesh.nodes:
            if self._refresh:
                first = self._rng.random() * _REFRESH_SECONDS
                engine.at(first, self._republish, node)
            self._ends[node.number] = self._session_end()
            if terms.session_seconds and not terms.every_seconds and node.number:
                engine.at(self._ends[node.number], self._leave, node)
        if terms.every_seconds:
            engine.after(terms.every_seconds, self._turn)

    def _session_end(self) -> float:
        mean = self._terms.session_seconds or 1.0
        scale = mean / _WEIBULL_MEAN
        return self._engine.now + self._rng.weibullvariate(scale, _WEIBULL_SHAPE)

    def _turn(self) -> None:
        """One peer leaves, or one that left comes back: in turn."""
        if self._engine.now >= self._end:
            return
        online = self._mesh.network.online
        here = [n for n in self._mesh.nodes[1:] if online[n.number]]
        away = [n for n in self._mesh.nodes if not online[n.number]]
        if self._leaving and here:
            self._kill(self._leaver(here))
        elif away:
            self._come_back(self._rng.choice(away))
        self._leaving = not self._leaving
        self._engine.after(self._terms.every_seconds, self._turn)

    def _leaver(self, here: list[Node]) -> Node:
        if self._terms.session == "uniform":
            return self._rng.choice(here)
        return min(here, key=lambda node: self._ends[node.number])

    def _leave(self, node: Node) -> None:
        if self._engine.now < self._end:
            self._kill(node)
            self._engine.after(self._terms.down_seconds, self._come_back, node)

    def _come_back(self, node: Node) -> None:
        self._restart(node)
        self._ends[node.number] = self._session_end()
        self._publish(node)
        if self._terms.session_seconds and not self._terms.every_seconds:
            self._engine.at(self._ends[node.number], self._leave, node)

    def _republish(self, node: Node) -> None:
        if self._mesh.network.online[node.number]:
            self._publish(node)
        self._engine.after(_REFRESH_SECONDS, self._republish, node)

    def _publish(self, node: Node) -> None:
        """Write the member record; a restart has a higher incarnation."""
        incarnation = self._incarnations.get(node.number, 1) + 1
        self._incarnations[node.number] = incarnation
        value = member_record(node.number, incarnation)
        self._mesh.write(node, f"m/{node.peer}", value, MEMBER_TTL_SECONDS)
