"""Runners that do sums: each peer's, and how they get each other's contributions."""

from __future__ import annotations

from dataclasses import dataclass, field

from fabric.core.digest import hex_digest
from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Generation, RoundDecision, RoundReport, StateHeld
from fabric.jobs.seat import Seat
from fabric.jobs.spec import JobSpec


@dataclass
class Sums:
    """One peer's runner. States of the last rounds stay available to others."""

    states: dict[int, str] = field(default_factory=lambda: {0: "initial"})
    generation: Generation | None = None
    round: int = 0
    work_until: float = 0.0
    holds: set[str] = field(default_factory=set)
    reported: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    fetching: bool = False
    decision: RoundDecision | None = None
    speed: float = 1.0
    fetch_seconds: float = 0.0
    fetch_from: float = 0.0
    kept: int = -1
    """The round whose own contribution is still served after it was applied."""
    corrupt: bool = False
    """The next state it computes is wrong."""


class Runners:
    """All peers' runners; the network is the rest of the object."""

    job: JobId
    spec: JobSpec
    now: float
    tells_cuts: bool
    cuts: set[frozenset[PeerId]]
    seats: dict[PeerId, Seat]
    sums: dict[PeerId, Sums]

    def pump(self, peer: PeerId) -> None:
        raise NotImplementedError

    def workers_linked(self, one: PeerId, other: PeerId) -> bool:
        raise NotImplementedError

    def apply(self, peer: PeerId, sums: Sums, generation: Generation) -> None:
        fresh = sums.generation is None or sums.round != generation.base_round
        sums.generation, sums.decision, sums.reported = generation, None, None
        base = generation.base_round
        have = sums.states.get(base) if base else "initial"
        right = base == 0 or (
            have is not None and hex_digest(have.encode()) == generation.state_digest
        )
        sums.fetching = not right
        sums.fetch_from = self.now + sums.fetch_seconds
        sums.round = base
        if base == 0:
            sums.states = {0: "initial"}
        if fresh:
            sums.work_until = self.now + sums.speed
            sums.holds, sums.kept = set(), -1

    def step_runner(self, peer: PeerId) -> None:
        sums = self.sums[peer]
        generation = sums.generation
        if generation is None:
            return
        if self.spec.kind == "serve":
            return
        if sums.fetching:
            self.fetch(peer, sums, generation)
            return
        if sums.round >= self.spec.train.outer.rounds:
            if sums.reported is None:
                sums.reported = ((), ())
                self.tell_held(peer, sums, generation)
            return
        if self.now >= sums.work_until:
            sums.holds.add(peer)
        sums.holds |= {p for p in generation.participants if self.serves(p, peer)}
        self.report(peer, sums, generation)
        self.follow(peer, sums, generation)

    def serves(self, source: PeerId, peer: PeerId) -> bool:
        """Whether ``source``'s worker gives ``peer`` its contribution to the round."""
        theirs, mine = self.sums.get(source), self.sums[peer]
        if source == peer or theirs is None or not self.workers_linked(source, peer):
            return False
        now = theirs.round == mine.round and source in theirs.holds
        same = theirs.states.get(mine.round) == mine.states[mine.round]
        return same and not theirs.fetching and (now or theirs.kept == mine.round)

    def report(self, peer: PeerId, sums: Sums, generation: Generation) -> None:
        holds = tuple(sorted(sums.holds))
        cut = tuple(
            other
            for other in generation.participants
            if self.tells_cuts and frozenset((peer, other)) in self.cuts
        )
        if holds and (holds, cut) != sums.reported:
            sums.reported = (holds, cut)
            tokens = 100 if peer in holds else 0
            counter, at = generation.counter, sums.round
            report = RoundReport(self.job, counter, at, holds, tokens, 2.0, cut)
            self.seats[peer].event(report, self.now)
            self.pump(peer)

    def follow(self, peer: PeerId, sums: Sums, generation: Generation) -> None:
        decision = sums.decision
        if decision is None or decision.counter != generation.counter:
            return
        if decision.round != sums.round or not set(decision.contributors) <= sums.holds:
            return
        state = sums.states[sums.round]
        parts = "".join(hex_digest((state + p).encode()) for p in decision.contributors)
        sums.kept = sums.round if peer in sums.holds else -1
        sums.round += 1
        wrong, sums.corrupt = "bit flip" * sums.corrupt, False
        # the outer step takes the settings in force: unequal ones diverge
        steered = "".join(f"{s.path}={s.value}" for s in decision.settings)
        whole = state + parts + wrong + steered
        sums.states[sums.round] = hex_digest(whole.encode())
        sums.states.pop(sums.round - 3, None)
        sums.work_until = self.now + sums.speed
        sums.holds, sums.reported, sums.decision = set(), None, None
        self.tell_held(peer, sums, generation)

    def fetch(self, peer: PeerId, sums: Sums, generation: Generation) -> None:
        base = generation.base_round
        if self.now < sums.fetch_from:
            return
        for source in generation.sources:
            state = self.sums[source].states.get(base) if source in self.sums else None
            if state is None or not self.workers_linked(peer, source):
                continue
            if hex_digest(state.encode()) == generation.state_digest:
                sums.states, sums.fetching = {base: state}, False
                sums.work_until = self.now + sums.speed
                self.tell_held(peer, sums, generation)
                return

    def tell_held(self, peer: PeerId, sums: Sums, generation: Generation) -> None:
        digest_hex = hex_digest(sums.states[sums.round].encode())
        held = StateHeld(self.job, generation.counter, sums.round, digest_hex)
        self.seats[peer].event(held, self.now)
        self.pump(peer)
