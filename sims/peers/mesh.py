"""All peers of a run with what moves between them: pushes, reconciliations, expiry."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

from crdt_store.config import StoreConfig
from crdt_store.entry import Entry
from crdt_store.messages import PUSH
from crdt_store.outcome import Outcome
from crdt_store.schedule import MAX_RUNNING
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId
from sims.engine.event_log import EventLog
from sims.engine.queue import Engine
from sims.model.gossip import Flood, Gossip
from sims.model.network import Network
from sims.peers.connections import Connections
from sims.peers.exchange import Exchange
from sims.peers.gate import Gate
from sims.peers.node import Node
from sims.peers.vitals import Vitals

_EXPIRY_SECONDS = StoreConfig().connect_poll_seconds
_DIAL_SECONDS = 0.5
"""The daemon looks for missing connections this often."""


class Mesh:
    """The peers of a run.

    Args:
        engine: Virtual time.
        network: Links.
        log: Of events.
        rng_gossip: Neighbours and gossip's faults.
        rng_faults: Which sessions break.
        connections: Connections per peer; 0: with everybody.

    Attributes:
        nodes: By number.
        num_members: Of the mesh.
        acknowledged: Called with (node, entry) when a write is on its disk.
        started: Called with each peer that comes up.
        numbers: Of the peers, by PeerId.
        vitals: Liveness, if it is simulated.
        gate: Who refuses whom.
        down_since: When those who are down went.
        calls: Calls into the production cores, by which.
    """

    def __init__(
        self,
        engine: Engine,
        network: Network,
        log: EventLog,
        rng_gossip: random.Random,
        rng_faults: random.Random,
        connections: int = 0,
    ) -> None:
        self.engine = engine
        self.network = network
        self.log = log
        self.gossip = Gossip(engine, network, rng_gossip, self._pushed)
        self.nodes: list[Node] = []
        self.num_members = 0
        self.acknowledged: Callable[[Node, Entry], None] = lambda node, entry: None
        self.started: Callable[[Node], None] = lambda node: None
        self.calls: Counter[str] = Counter()
        self.numbers: dict[PeerId, int] = {}
        self.vitals: Vitals | None = None
        self.gate = Gate(network, log)
        self.down_since: dict[int, float] = {}
        self._connections = Connections(connections)
        self._connections_epoch = -1
        self._rng = rng_faults

    # --- peers come and go

    def add(self, node: Node) -> None:
        """Take in a peer that is not online yet; ``node.number`` is its place."""
        assert node.number == len(self.nodes)
        self.nodes.append(node)
        self.numbers[node.peer] = node.number

    def online(self, node: Node) -> None:
        """Bring ``node`` up; its replica is ready."""
        self.network.set_online(node.number, True)
        self.log.write(self.engine.now, f"up {node.number}")
        generation = node.generation
        self.engine.after(node.poll_phase, self._look, node, generation)
        self.down_since.pop(node.number, None)
        if self.vitals is not None:
            self.vitals.start(node, self._members(node), self._neighbours(node))
        self.started(node)

    def offline(self, node: Node) -> None:
        """End ``node`` as kill -9 does."""
        node.generation += 1
        connected = self.connected(node)
        self.network.set_online(node.number, False)
        self.down_since[node.number] = self.engine.now
        if self.vitals is not None:
            self.vitals.broke(node, connected)
        self.log.write(self.engine.now, f"down {node.number}")

    def look_soon(self) -> None:
        """Have those notice whose connections came or went."""
        changed = self._all_connections().take_changed()
        for node in self.nodes:
            if node.peer in changed and self.network.online[node.number]:
                late = _DIAL_SECONDS * (0.5 + node.poll_phase)
                self.engine.after(late, self._consult, node, node.generation)

    def connected(self, node: Node) -> frozenset[PeerId]:
        """Return whom ``node`` has a connection with now."""
        side = self.network.side[node.number]
        return self._accepted(node, self._all_connections().of(node.peer, side))

    def _members(self, node: Node) -> frozenset[PeerId]:
        return self._accepted(node, frozenset(self.numbers))

    def _accepted(self, node: Node, peers: frozenset[PeerId]) -> frozenset[PeerId]:
        """Return those of ``peers`` that neither refuse ``node`` nor are refused."""
        if not self.network.bars_anybody:
            return peers
        barred, number = self.network.barred, node.number
        return frozenset(p for p in peers if not barred(number, self.numbers[p]))

    def _neighbours(self, node: Node) -> frozenset[PeerId] | None:
        side = self.network.side[node.number]
        return self._all_connections().chosen(node.peer, side)

    def _all_connections(self) -> Connections:
        if self._connections_epoch != self.network.epoch:
            self._connections_epoch = self.network.epoch
            self._connections.set_sides(self._sides())
        return self._connections

    def _sides(self) -> dict[int, frozenset[PeerId]]:
        sides: dict[int, set[PeerId]] = {}
        for node in self.nodes:
            if self.network.online[node.number] and not node.barred:
                side = self.network.side[node.number]
                sides.setdefault(side, set()).add(node.peer)
        return {side: frozenset(peers) for side, peers in sides.items()}

    # --- reconciliation

    def _look(self, node: Node, generation: int) -> None:
        """Consult the schedule now and again at the first poll after it is due."""
        if node.generation != generation:
            return
        self._consult(node, generation)
        poll = node.config.connect_poll_seconds
        polls = math.ceil((node.schedule.next_round - self.engine.now) / poll)
        self.engine.after(max(1, polls) * poll, self._look, node, generation)

    def _consult(self, node: Node, generation: int) -> None:
        if node.generation != generation:
            return
        self.calls["schedule"] += 1
        connected, now = self.connected(node), self.engine.now
        if self.vitals is not None:
            self.vitals.look(node, connected, self._neighbours(node))
        chosen = node.schedule.due(now, connected, self.num_members)
        for peer in chosen:
            self._begin(node, self.nodes[self.numbers[peer]])
        if len(chosen) >= MAX_RUNNING:  # there may be more: look at the next poll
            poll = node.config.connect_poll_seconds
            self.engine.after(poll, self._consult, node, generation)

    def _begin(self, node: Node, partner: Node) -> None:
        self.calls["session"] += 1
        cut = self.network.terms.cut_sessions
        breaks_at = 0
        if cut and self._rng.random() < cut:
            breaks_at = self._rng.randint(1, 6)
        Exchange(
            self.engine, self.network, node, partner, self._ended, breaks_at
        ).step()

    def _ended(self, exchange: Exchange, reason: str) -> None:
        node = exchange.node
        node.schedule.ended(exchange.partner.peer, news=exchange.num_new > 0)
        if reason or exchange.num_requests > 1:
            self.log.write(
                self.engine.now,
                f"sync {node.number} with={exchange.partner.number}"
                f" requests={exchange.num_requests} bytes={exchange.num_bytes}"
                f" {reason or 'ok'}",
            )
        if reason and self.network.online[node.number]:
            self._consult(node, node.generation)

    # --- writes and pushes

    def write(self, node: Node, key: str, value: bytes, ttl_seconds: int = 0) -> str:
        """Have ``node`` write; return why it may not, or ""."""
        reason = node.sign(key, value, ttl_seconds, self.engine.now)
        self.log.write(
            self.engine.now, f"write {node.number} key={key} {reason or 'ok'}"
        )
        if not reason and len(node.uncommitted) == 1:
            self.engine.after(
                node.config.commit_batch_seconds, self._commit, node, node.generation
            )
        return reason

    def _commit(self, node: Node, generation: int) -> None:
        if node.generation != generation:
            return  # killed before the commit: never acknowledged
        now = self.engine.now
        for entry in node.commit(now):
            self.acknowledged(node, entry)
            self.log.write(now, f"ack {node.number} {entry.id.hex()[:12]}")
        self._plan_push(node)

    def _plan_push(self, node: Node) -> None:
        if node.pushes.next_at is not None:
            self.engine.at(node.pushes.next_at, self._push, node, node.generation)

    def _push(self, node: Node, generation: int) -> None:
        if node.generation != generation:
            return
        self.calls["push"] += 1
        payload = node.pushes.take(self.engine.now)
        if payload is not None:
            flood = self.gossip.publish(node.number, payload)
            self.log.write(
                self.engine.now,
                f"push {node.number} message={flood.serial} bytes={len(payload)}",
            )
            self._plan_push(node)

    def publish_untrusted(self, node: Node, payload: bytes) -> None:
        """Have ``node`` publish any bytes: it may be hostile."""
        self.gossip.publish(node.number, payload)

    def _pushed(self, peer: int, flood: Flood) -> None:
        node = self.nodes[peer]
        self.calls["ingest"] += 1
        try:
            message = PUSH.decode_untrusted(flood.payload)
        except RemoteProtocolError:
            node.outcomes[Outcome.MALFORMED] += 1
            return
        outcomes = node.take_in_untrusted(message.entries, self.engine.now, live=True)
        self.log.write(
            self.engine.now,
            f"pushed {peer} message={flood.serial} new={outcomes[Outcome.ACCEPTED]}",
        )

    # --- expiry

    def run_expiry(self) -> None:
        """Have all peers drop what is too old, and the revoked, once per poll."""
        online, now = self.network.online, self.engine.now
        for node in self.nodes:
            if node.tick_at <= node.wall(now) and online[node.number]:
                node.expire(now)
        refusals = self.gate.look(self.nodes, now)
        for node, _ in refusals:
            if self.vitals is not None and online[node.number]:
                self.vitals.set_members(node, self._members(node))
        if refusals:
            self.look_soon()
        self.engine.after(_EXPIRY_SECONDS, self.run_expiry)
