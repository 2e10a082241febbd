"""Who holds what, asked of the mesh: the shell around the search of provider records.

Drives the production search (:mod:`fabric.net.lookup`) and the plan of announcements
(:mod:`dht.providers`) of every peer. The answering side is py-libp2p's in a daemon, on
trio and a real clock; :mod:`sims.model.kad_table` models it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from dht.config import ContentConfig
from dht.providers import MAX_PROVIDERS, Announcements, usable_providers
from fabric.core.ids import BlobId, PeerId
from fabric.net.config import RoutingConfig
from fabric.net.lookup import Walk, target_of
from sims.engine.queue import Engine
from sims.model.kad_table import Table
from sims.model.network import Network
from sims.model.scenario import Lookups as Terms
from sims.peers.mesh import Mesh
from sims.peers.node import Node
from sims.report.report import LookupFigures

_DIAL_ROUND_TRIPS = 4
"""TCP, multistream, Noise, yamux: before a peer without a connection can be asked."""
_REQUEST_BYTES = 120
"""Message, multistream and yamux of one question."""
_PEER_BYTES = 320
"""A peer in an answer: id, two addresses, its signed record."""
_WARM_UP_SECONDS = 60.0
"""Everything was announced once by then; searches begin."""

_Answered = Callable[[tuple[PeerId, ...] | None], None]
"""Called with the providers named, or None for silence."""


class _Search:
    """A walk under way, with what its shell counts."""

    def __init__(
        self, node: Node, key: bytes, config: RoutingConfig, enough: int | None
    ) -> None:
        self.node = node
        self.generation = node.generation
        self.walk = Walk(
            key,
            node.peer,
            replicas=config.replicas,
            parallel=config.parallel,
            enough=enough,
        )
        self.began = 0.0
        self.depths: dict[PeerId, int] = {}
        self.hops = 0
        self.over = False
        self.stored: list[PeerId] = []
        self.unsure = 0


class Lookups:
    """The content routing of all peers.

    Args:
        engine: Virtual time.
        network: Carries questions.
        mesh: The peers.
        terms: What is announced and searched.
        until: When searches end.
        stream: Randomness by purpose.

    Attributes:
        num_calls: Calls into searches and announcements.
        num_searches: Of contents that somebody up held.
        found: Of those that ended with a living holder: (hops, seconds).
    """

    def __init__(
        self,
        engine: Engine,
        network: Network,
        mesh: Mesh,
        terms: Terms,
        until: float,
        stream: Callable[[str], random.Random],
    ) -> None:
        self._engine = engine
        self._network = network
        self._mesh = mesh
        self._terms = terms
        self._until = until
        self._rng = stream("lookups")
        self._config = RoutingConfig()
        self._tables: dict[int, tuple[int, Table]] = {}
        self._holders: dict[BlobId, frozenset[int]] = {}
        self.num_calls = 0
        self.num_searches = 0
        self.found: list[tuple[int, float]] = []

    def plan(self) -> None:
        """Decide who holds what; announce and search from now on."""
        size = len(self._mesh.nodes)
        for _ in range(self._terms.roots):
            root = BlobId(self._rng.randbytes(32).hex())
            holders = self._rng.sample(range(size), min(self._terms.holders, size))
            self._holders[root] = frozenset(holders)
        self._mesh.started = self.started
        for node in self._mesh.nodes:
            if self._network.online[node.number]:
                self.started(node)
        self._engine.after(_WARM_UP_SECONDS, self._search)

    @property
    def found_share(self) -> float:
        """The searches that found a holder within reach, of all."""
        return len(self.found) / self.num_searches if self.num_searches else 1.0

    def figures(self) -> LookupFigures:
        """Return how the searches went."""
        hops = sorted(hops for hops, _ in self.found) or [0]
        seconds = sorted(seconds for _, seconds in self.found) or [0.0]
        return LookupFigures(
            searches=self.num_searches,
            found_share=round(self.found_share, 4),
            hops_p50=hops[len(hops) // 2],
            hops_max=hops[-1],
            seconds_p50=round(seconds[len(seconds) // 2], 3),
            seconds_p95=round(seconds[len(seconds) * 95 // 100], 3),
        )

    # --- announcing

    def started(self, node: Node) -> None:
        """``node`` came up: it announces all it holds, as a daemon does."""
        held = [r for r, numbers in self._holders.items() if node.number in numbers]
        if not held:
            return
        announcements = Announcements(ContentConfig().republish_seconds, self._rng)
        for root in held:
            announcements.add(root, self._engine.now)
        late = self._rng.random()  # its first connections come about
        self._engine.after(
            1 + late, self._announce, node, node.generation, announcements
        )

    def _announce(self, node: Node, generation: int, due: Announcements) -> None:
        if node.generation != generation:
            return
        now = self._engine.now
        self.num_calls += 1
        root = due.next_root(now)
        if root is None:
            when = due.next_timeout()
            if when is not None:
                self._engine.at(when, self._announce, node, generation, due)
            return
        begin = partial(self._begin, node, root, None, partial(self._store, due))
        self._engine.after(due.pace(now), begin)

    def _store(self, due: Announcements, search: _Search, root: BlobId) -> None:
        """Ask the nearest that answered to store the record, and count them."""
        nearest = search.walk.nearest(search.walk.answered, self._config.replicas)
        search.unsure = len(nearest)
        for peer in nearest:
            said = partial(self._stored, due, search, root, peer)
            self._ask(search, peer, said, announce=True)
        if not nearest:
            self._announced(search, root, due)

    def _stored(
        self,
        due: Announcements,
        search: _Search,
        root: BlobId,
        peer: PeerId,
        providers: tuple[PeerId, ...] | None,
    ) -> None:
        search.unsure -= 1
        if providers is not None and search.node.peer in providers:
            search.stored.append(peer)
        if not search.unsure:
            self._announced(search, root, due)

    def _announced(self, search: _Search, root: BlobId, due: Announcements) -> None:
        now, node, stored = self._engine.now, search.node, len(search.stored)
        due.on_announced(root, stored, now)
        self._mesh.log.write(now, f"provide {node.number} {root[:8]} stored={stored}")
        self._announce(node, search.generation, due)

    # --- searching

    def _search(self) -> None:
        """Have somebody look for something that somebody up holds."""
        if self._engine.now >= self._until:
            return
        root = self._rng.choice(list(self._holders))
        online = self._network.online
        seekers = [n for n in self._mesh.nodes if online[n.number]]
        node = self._rng.choice(seekers)
        holders = self._holders[root] - {node.number}
        if any(self._network.linked(node.number, number) for number in holders):
            self.num_searches += 1
            self._begin(node, root, MAX_PROVIDERS, self._finish)
        self._engine.after(self._rng.expovariate(self._terms.per_second), self._search)

    def _finish(self, search: _Search, root: BlobId) -> None:
        now, node = self._engine.now, search.node
        named = usable_providers((), search.walk.providers, node.peer)
        numbers = [self._mesh.numbers[peer] for peer in named]
        living = [n for n in numbers if self._network.linked(node.number, n)]
        good = sum(n in self._holders[root] for n in living)
        self._mesh.log.write(
            now, f"lookup {node.number} {root[:8]} hops={search.hops} living={good}"
        )
        if good:
            self.found.append((search.hops, now - search.began))

    # --- the walk

    def _begin(
        self,
        node: Node,
        root: BlobId,
        enough: int | None,
        done: Callable[[_Search, BlobId], None],
    ) -> None:
        search = _Search(node, bytes.fromhex(root), self._config, enough)
        search.began = self._engine.now
        table, walk = self._table(node), search.walk
        for peer in sorted(self._mesh.connected(node)):
            walk.learn(peer, ())
        for peer in table.nearest(target_of(walk.key)):
            walk.learn(peer, ())
        walk.providers |= table.records.get(walk.key, {})
        end = search.began + self._config.search_seconds
        self._engine.at(end, self._step, search, root, done)
        self._step(search, root, done)

    def _step(
        self, search: _Search, root: BlobId, done: Callable[[_Search, BlobId], None]
    ) -> None:
        """Ask whom the walk names, and end it when it is over or its time is."""
        if search.over or search.node.generation != search.generation:
            return
        self.num_calls += 1
        walk, now = search.walk, self._engine.now
        late = now >= search.began + self._config.search_seconds
        if late or walk.is_over(now):
            search.over = True
            done(search, root)
            return
        for peer in walk.take(now):
            depth = search.depths.setdefault(peer, 1)
            said = partial(self._answered, search, root, done, peer, depth)
            self._ask(search, peer, said, announce=False)
        self._engine.at(walk.next_timeout(now), self._step, search, root, done)

    def _answered(
        self,
        search: _Search,
        root: BlobId,
        done: Callable[[_Search, BlobId], None],
        peer: PeerId,
        depth: int,
        providers: tuple[PeerId, ...] | None,
    ) -> None:
        if providers is None:
            search.walk.miss(peer)
        else:
            search.walk.hear(peer, providers)
            search.hops = max(search.hops, depth)
        self._step(search, root, done)

    # --- one question

    def _ask(
        self, search: _Search, peer: PeerId, said: _Answered, *, announce: bool
    ) -> None:
        node, partner = search.node, self._mesh.nodes[self._mesh.numbers[peer]]
        if not self._network.linked(node.number, partner.number):
            self._lost(search, peer, said)
            return
        dial = 0.0
        if peer not in self._mesh.connected(node):
            there = self._network.delay(node.number, partner.number, 0)
            dial = 2 * there * _DIAL_ROUND_TRIPS
        send = partial(
            self._network.send,
            node.number,
            partner.number,
            "lookup",
            _REQUEST_BYTES * (2 if announce else 1),
            partial(self._serve, search, partner, said, announce),
            partial(self._lost, search, peer, said),
        )
        self._engine.after(dial, send)

    def _serve(
        self, search: _Search, partner: Node, said: _Answered, announce: bool
    ) -> None:
        table, key = self._table(partner), search.walk.key
        table.add(search.node.peer, self._lives)
        if announce:
            table.records.setdefault(key, {})[search.node.peer] = None
        providers = tuple(table.records.get(key, ()))[:MAX_PROVIDERS]
        nearer = [p for p in table.nearest(target_of(key)) if p != search.node.peer]
        size = _REQUEST_BYTES + _PEER_BYTES * (len(providers) + len(nearer))
        self._network.send(
            partner.number,
            search.node.number,
            "lookup",
            size,
            partial(self._hear, search, partner.peer, said, providers, nearer),
            partial(self._lost, search, partner.peer, said),
        )

    def _hear(
        self,
        search: _Search,
        peer: PeerId,
        said: _Answered,
        providers: tuple[PeerId, ...],
        nearer: list[PeerId],
    ) -> None:
        depth = search.depths.get(peer, 0) + 1
        for other in nearer:
            search.walk.learn(other, ())
            search.depths.setdefault(other, depth)
        said(providers)

    def _lost(self, search: _Search, peer: PeerId, said: _Answered) -> None:
        self._engine.after(self._config.query_seconds, self._silent, search, peer, said)

    def _silent(self, search: _Search, peer: PeerId, said: _Answered) -> None:
        self._table(search.node).remove(peer)
        said(None)

    # --- the answering side

    def _lives(self, peer: PeerId) -> bool:
        return self._network.online[self._mesh.numbers[peer]]

    def _table(self, node: Node) -> Table:
        """Return what this process of ``node`` knows; connections are in it."""
        generation, table = self._tables.get(node.number, (-1, None))
        if table is None or generation != node.generation:
            table = Table(node.peer)
            self._tables[node.number] = node.generation, table
        connected = self._mesh.connected(node)
        for peer in sorted(connected - table.connected):
            table.add(peer, self._lives)
        table.connected = connected
        return table
