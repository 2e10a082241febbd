"""One run of the simulator: build the mesh, let the scenario happen, judge the end."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from crdt_store.entry import Entry
from crdt_store.outcome import Outcome
from sims.engine.event_log import EventLog
from sims.engine.queue import Engine
from sims.engine.randomness import key, stream
from sims.model.attacks import Attacker
from sims.model.network import Network
from sims.model.scenario import Scenario
from sims.peers.committee import Committee, plan_kills
from sims.peers.drama import Drama
from sims.peers.founding import Founding, first_records, found
from sims.peers.ledger import Ledger
from sims.peers.library import Library, SharedEntry
from sims.peers.lookups import Lookups
from sims.peers.mesh import Mesh
from sims.peers.node import Node
from sims.peers.traversal import Traversal
from sims.peers.vitals import Vitals
from sims.report.report import Report, Sample

_SETTLE_LOOK_SECONDS = 1.0
_STALENESS_PEERS = 50
"""Peers whose views are looked at for staleness."""
_FOUND_SHARE = 0.9
"""Of the searches of providers that have to find one that lives."""


class Simulation:
    """One run.

    Args:
        scenario: What is modelled.
        seed: Of everything random.
        name: Of the scenario, for the report and the command that replays.
        log_file: Where event lines go besides their hash.
    """

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        name: str = "scenario",
        log_file: BinaryIO | None = None,
    ) -> None:
        self.scenario = scenario
        self.seed = seed
        self.name = name
        self.samples: list[Sample] = []
        self.engine = Engine()
        self.log = EventLog(log_file)
        self.library = Library()
        self.ledger = Ledger()
        self.network = Network(self.engine, scenario.network, self._stream("links"))
        self.mesh = Mesh(
            self.engine,
            self.network,
            self.log,
            self._stream("gossip"),
            self._stream("faults"),
            scenario.connections,
        )
        self.mesh.acknowledged = self._acknowledged
        if scenario.liveness:
            self.mesh.vitals = Vitals(
                self.engine,
                self.network,
                self.mesh.nodes,
                self.mesh.numbers,
                self._stream,
            )
        self.committee: Committee | None = None
        self.lookups: Lookups | None = None
        self.traversal: Traversal | None = None
        self._late = self._choose_late()
        self._founding = found(seed, scenario.nodes, self._late)
        self.drama = Drama(
            scenario,
            self.engine,
            self.mesh,
            self._attacker(),
            self._stream,
            self._late,
        )
        self._violations: list[str] = []
        self._sent_before = 0
        self.num_false_deaths = 0
        self._converged_at: float | None = None

    def _stream(self, purpose: str) -> random.Random:
        return stream(self.seed, purpose)

    def _choose_late(self) -> frozenset[int]:
        nodes = self.scenario.nodes
        number = int(self.scenario.trust.late_grants * nodes)
        # the owner and the attacker are members from the start
        candidates = range(1, nodes - 1)
        chosen = min(number, len(candidates))
        return frozenset(self._stream("late").sample(candidates, chosen))

    def _attacker(self) -> Attacker:
        founding = self._founding
        *honest, hostile = founding.signers
        return Attacker(
            self._stream("attacks"),
            founding.mesh.id,
            hostile,
            key(self.seed, "stranger"),
            list(honest or [hostile]),
        )

    def _acknowledged(self, node: Node, entry: Entry) -> None:
        self.ledger.acknowledge(entry, self.engine.now)
        self.drama.attacker.hear(entry)

    # --- the run

    def run(self) -> Report:
        """Let it all happen; return what came of it."""
        started = time.perf_counter()
        with _without_collector():
            self.prepare()
            self.engine.run(self.scenario.fault_seconds)
            self._settle()
        self._judge()
        return self._report(time.perf_counter() - started)

    def prepare(self) -> None:
        """Bring the peers up and plan what will happen to them."""
        self._build(self._founding)
        self.drama.plan()
        self._plan_job()
        self._plan_lookups()
        if self.scenario.traversal:
            self.traversal = Traversal(self.engine, self.network, self.mesh)
            self.traversal.look()
        self.engine.after(self.scenario.sample_seconds, self._sample)
        self.mesh.run_expiry()

    def _build(self, founding: Founding) -> None:
        scenario, skews = self.scenario, self._stream("skews")
        self.mesh.num_members = len(founding.entries)
        entries = [self.library.signed(entry) for entry in founding.entries]
        if scenario.converged_start:
            entries += [self.library.signed(e) for e in first_records(founding)]
        pattern = self._pattern(entries)
        for number, signer in enumerate(founding.signers):
            rng = self._stream(f"peer-{number}")
            node = Node(
                self.network.add(),
                signer,
                founding.mesh,
                scenario.store,
                self.library,
                rng,
            )
            node.skew = (2 * skews.random() - 1) * scenario.clocks.skew_seconds
            self.mesh.add(node)
        for node in self.mesh.nodes:
            if node.number not in self._late:
                node.start_as(pattern, 0.0, self.mesh.num_members)
                self.mesh.online(node)

    def _pattern(self, entries: list[SharedEntry]) -> Node:
        """Return a peer outside the mesh that holds ``entries``, for others to copy."""
        founding, scenario = self._founding, self.scenario
        signer = key(self.seed, "pattern")
        node = Node(
            -1, signer, founding.mesh, scenario.store, self.library, self._stream("pat")
        )
        node.storage.write(entries, ())
        node.start(0.0, self.mesh.num_members)
        node.replica.authority.members(node.wall(0.0))  # so that all share the answers
        return node

    def _plan_job(self) -> None:
        terms, end = self.scenario.coordinator, self.scenario.fault_seconds
        if not terms.participants:
            return
        size = min(terms.participants, len(self.mesh.nodes))
        self.committee = Committee(
            self.engine, self.network, self.mesh, size, self._stream("job")
        )
        self.committee.look()
        kills = terms.kill_leaders
        plan_kills(
            self.committee,
            self.engine,
            self.drama.kill,
            self.drama.restart,
            [end * (at + 1) / (kills + 1) for at in range(kills)],
            self.scenario.churn.down_seconds,
        )

    def _plan_lookups(self) -> None:
        scenario = self.scenario
        if scenario.lookups.roots:
            self.lookups = Lookups(
                self.engine,
                self.network,
                self.mesh,
                scenario.lookups,
                scenario.fault_seconds,
                self._stream,
            )
            self.lookups.plan()

    def _settle(self) -> None:
        """Go on until everybody agrees, or the time for it is over."""
        start = self.engine.now
        while self.engine.now < start + self.scenario.settle_seconds:
            self.engine.run(self.engine.now + _SETTLE_LOOK_SECONDS)
            online = self._online()
            if self.committee is not None and self.committee.unfinished():
                continue
            if self.traversal is not None and self.traversal.unfinished():
                continue
            if self.ledger.agreeing(online) == len(online):
                self._converged_at = self.engine.now - start
                return

    def _online(self) -> list[Node]:
        """Return who runs; the revoked no longer count once everybody refuses them."""
        online = self.network.online
        return [n for n in self.mesh.nodes if online[n.number] and not n.barred]

    def _sample(self) -> None:
        online, now = self._online(), self.engine.now
        period, sent = self.scenario.sample_seconds, sum(self.network.sent)
        peers = max(1, len(online))
        rate = (sent - self._sent_before) / peers / period
        self._sent_before = sent
        agreeing = self.ledger.agreeing(online) / peers
        stale = self.ledger.staleness(online[:_STALENESS_PEERS], now)
        self.samples.append(Sample(now, agreeing, rate, stale, len(online)))
        self.engine.after(period, self._sample)

    # --- the verdict

    def _judge(self) -> None:
        if self._converged_at is None and self.scenario.must_converge:
            online = self._online()
            agree = self.ledger.agreeing(online)
            self._violations.append(f"{agree} of {len(online)} peers agree in the end")
        lost = self.num_lost()
        if lost:
            self._violations.append(f"{lost} acknowledged writes are lost")
        if self.committee is not None:
            self._violations += self.committee.violations
            unfinished = self.committee.unfinished()
            self._violations += [unfinished] if unfinished else []
        if self.traversal is not None and (left := self.traversal.unfinished()):
            self._violations.append(left)
        if self.lookups is not None and self.lookups.found_share < _FOUND_SHARE:
            share = f"{self.lookups.found_share:.1%}"
            self._violations.append(f"only {share} of the searches found a holder")
        if self.mesh.vitals is not None:
            self._check_ghosts(self.mesh.vitals)
        if self.scenario.trust.attack_share:
            for node in self._online():
                self._check_views(node)

    def num_lost(self) -> int:
        """Return how many acknowledged writes some peer lacks now."""
        if self._converged_at is not None:
            # all offer the same entries, so one speaks for all
            return len(self.ledger.lost(self._online()[0], self.engine.now))
        lost: set[bytes] = set()
        for node in self._online():
            lost |= {entry.id for entry in self.ledger.lost(node, self.engine.now)}
        return len(lost)

    def _check_ghosts(self, vitals: Vitals) -> None:
        """Whoever is gone for longer than the bound is dead in every view."""
        bound = vitals.bound_seconds(self.mesh.num_members)
        gone = {
            self.mesh.nodes[number].peer
            for number, since in self.mesh.down_since.items()
            if self.engine.now - since > bound
        }
        settled = {
            n.peer for n in self._online() if self.engine.now - n.up_since > bound
        }
        for node in self._online():
            ghosts = len(gone - vitals.dead(node))
            up = self.engine.now - node.up_since > bound
            if ghosts and up:
                self._violations.append(f"peer {node.number} sees {ghosts} ghosts")
            self.num_false_deaths += len(settled & vitals.dead(node))

    def _check_views(self, node: Node) -> None:
        """Nothing may be held that an honest replica would not let in."""
        node.replica.check_integrity()
        for entry in node.replica.slots:
            assert isinstance(entry, SharedEntry)
            if not entry.signature_matches():
                self._violations.append(f"peer {node.number} holds a forged entry")

    def _core_calls(self) -> Counter[str]:
        calls = self.mesh.calls + Counter(offer=self.library.num_offered)
        if self.mesh.vitals is not None:
            calls["liveness"] = self.mesh.vitals.num_calls
        if self.committee is not None:
            calls["seat"] = self.committee.num_calls
        if self.lookups is not None:
            calls["lookup"] = self.lookups.num_calls
        if self.traversal is not None:
            calls["path"] = self.traversal.num_calls
        return calls

    def _report(self, wall_seconds: float) -> Report:
        outcomes: Counter[Outcome] = Counter()
        for node in self.mesh.nodes:
            outcomes += node.outcomes
        spread = sorted(self.ledger.spread_seconds)
        sent, now = self.network.sent, self.engine.now
        mean = sum(sent) / len(sent)
        return Report(
            scenario=self.name,
            seed=self.seed,
            nodes=self.scenario.nodes,
            log_hash=self.log.hash(),
            converged=self._converged_at is not None,
            convergence_seconds=self._converged_at,
            lost_writes=self.num_lost(),
            writes=self.ledger.num_acknowledged,
            attacks=self.drama.num_attacks,
            refused={o.value: n for o, n in sorted(outcomes.items()) if not o.harmless},
            bytes_by_kind=dict(sorted(self.network.by_kind.items())),
            bytes_per_peer_second=round(mean / now, 3),
            busiest_peer_factor=round(max(sent) / mean, 2) if mean else 0.0,
            spread_seconds_p50=spread[len(spread) // 2] if spread else None,
            spread_seconds_max=spread[-1] if spread else None,
            events=self.engine.num_events,
            events_per_second=round(self.engine.num_events / wall_seconds),
            core_calls=dict(sorted(self._core_calls().items())),
            signatures_verified=self.library.num_verified,
            virtual_seconds=round(now, 3),
            wall_seconds=round(wall_seconds, 3),
            generations=len(self.committee.generations) if self.committee else 0,
            false_deaths=self.num_false_deaths,
            lookups=self.lookups.figures() if self.lookups else None,
            paths=self.traversal.figures() if self.traversal else None,
            violations=tuple(self._violations),
            replay=replay_command(Path(self.name), self.seed, self.scenario.nodes),
        )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Leave out the search for cycles: millions of objects, and few cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def replay_command(scenario: Path, seed: int, nodes: int) -> str:
    """Return the command that does the same run again."""
    return f"fabric sim run {scenario} --seed {seed} --nodes {nodes} --json"
