"""Which contributions make up a round? The coordinator's table for one generation.

A round is decided once per (counter, round), when every live participant holds the same
full set, or, past the deadline, with the largest set that all live reporters hold. A
contribution that some reporter lacks is never in it. Deadlines follow measured time:

    slowest tolerated = max(patience, 2 x median time of those who finished)

so nobody is left out because everybody is slow. Slow is not dead: a live participant
without a contribution is left out of this round only; one that has not reported at all
is named *behind*, and must fetch the next state.

When worker links are cut, the reporters may share nothing. Waiting longer helps as long
as a missing contribution may still be on its way; when every hole lies on a link that
one of its ends reports broken, or nothing moved for STALL patiences, the largest group
of reporters that share a contributor decides, and the other reporters are behind too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from fabric.core.ids import PeerId
from fabric.jobs.messages import Generation, RoundDecision, RoundReport

STALL = 8
"""Patiences without a new contribution anywhere after which none is on its way."""


@dataclass(frozen=True)
class Closed:
    """A decided round.

    Attributes:
        decision: What every participant is told.
        behind: Live participants that cannot follow it without fetching.
        seconds: From the round's start to its decision.
        loss: Token-weighted mean training loss of the contributors, nats per token.
    """

    decision: RoundDecision
    behind: frozenset[PeerId]
    seconds: float
    loss: float


class RoundTable:
    """Reports and decisions of one generation.

    Args:
        generation: The generation; its counter fences reports.
        rounds: Rounds of the whole run.
        patience: Seconds, the spec's one knob.
        now: Monotonic seconds at the start.
    """

    def __init__(
        self, generation: Generation, rounds: int, patience: float, now: float
    ) -> None:
        self._generation = generation
        self._rounds = rounds
        self._patience = patience
        self.round = generation.base_round
        self._started = now
        self._reports: dict[PeerId, RoundReport] = {}
        self._finished: dict[PeerId, float] = {}
        self._moved_at = now
        self._broken: dict[PeerId, frozenset[PeerId]] = {}

    @property
    def over(self) -> bool:
        """Whether every round of the run is decided."""
        return self.round >= self._rounds

    @property
    def reporters(self) -> frozenset[PeerId]:
        """Participants that reported anything in this round."""
        return frozenset(self._reports)

    def report(self, peer: PeerId, report: RoundReport, now: float) -> bool:
        """Take ``peer``'s report; False when it belongs to another epoch or round."""
        if (report.counter, report.round) != (self._generation.counter, self.round):
            return False
        if peer not in self._generation.participants:
            return False
        known = set(self._generation.participants)
        holds = tuple(sorted(known.intersection(report.holds)))
        earlier = self._reports.get(peer)
        if earlier is not None and not set(earlier.holds) <= set(holds):
            return True  # overtaken on the wire: what a peer holds only grows
        if earlier is None or holds != earlier.holds:
            self._moved_at = now
        self._broken[peer] = frozenset(known.intersection(report.broken))
        self._reports[peer] = RoundReport(
            job=report.job,
            counter=report.counter,
            round=report.round,
            holds=holds,
            tokens=report.tokens,
            loss=report.loss if math.isfinite(report.loss) else 0.0,
            broken=report.broken,
        )
        if peer in holds:
            self._finished.setdefault(peer, now - self._started)
        return True

    def deadline(self) -> float | None:
        """Return when waiting for the slowest ends; None while nobody finished."""
        if not self._finished:
            return None
        median = statistics.median(self._finished.values())
        return self._started + max(self._patience, 2 * median)

    def decide(self, live: frozenset[PeerId], now: float) -> Closed | None:
        """Return the decision of the current round, if it can be taken now.

        Args:
            live: Participants that are not lost and whose worker has not failed.
            now: Monotonic seconds.
        """
        if self.over:
            return None
        reporters = live & self._reports.keys()
        shared = self._shared(reporters)
        full = bool(shared) and reporters == live and shared >= live
        deadline = self.deadline()
        if not full and (deadline is None or now < deadline):
            return None
        if not shared:
            reporters = self._largest_group(reporters, now)
            shared = self._shared(reporters)
        return self._close(shared, live - reporters, now) if shared else None

    def cut_links(self, live: frozenset[PeerId]) -> tuple[tuple[PeerId, PeerId], ...]:
        """Return the pairs of ``live`` whose worker link one end reports broken."""
        pairs = {
            (min(peer, other), max(peer, other))
            for peer in live & self._broken.keys()
            for other in live & self._broken[peer]
            if peer != other
        }
        return tuple(sorted(pairs))

    def _shared(self, reporters: frozenset[PeerId]) -> frozenset[PeerId]:
        sets = [frozenset(self._reports[peer].holds) for peer in reporters]
        shared = frozenset.intersection(*sets) if sets else frozenset()
        # tokens and loss come with the contributor's own report
        return frozenset(p for p in shared if p in self._finished)

    def _largest_group(
        self, reporters: frozenset[PeerId], now: float
    ) -> frozenset[PeerId]:
        """Return most reporters that share a contributor; none while it may change.

        Ties go to the contributor whose id sorts first.
        """
        finished = sorted(reporters & self._finished.keys())
        stalled = now - self._moved_at >= STALL * self._patience
        if not finished or not (stalled or self._holes_are_cut(reporters)):
            return frozenset()
        groups = [
            frozenset(p for p in reporters if peer in self._reports[p].holds)
            for peer in finished
        ]
        return max(groups, key=len)

    def _holes_are_cut(self, reporters: frozenset[PeerId]) -> bool:
        cut = set(self.cut_links(reporters))
        return all(
            (min(peer, other), max(peer, other)) in cut
            for peer in reporters
            for other in reporters & self._finished.keys()
            if other not in self._reports[peer].holds
        )

    def _close(
        self, shared: frozenset[PeerId], behind: frozenset[PeerId], now: float
    ) -> Closed:
        contributors = tuple(sorted(shared))
        tokens = tuple(self._reports[p].tokens for p in contributors)
        weighted = sum(
            self._reports[p].loss * n for p, n in zip(contributors, tokens, strict=True)
        )
        decision = RoundDecision(
            job=self._generation.job,
            counter=self._generation.counter,
            round=self.round,
            contributors=contributors,
            tokens=tokens,
            last=self.round + 1 >= self._rounds,
        )
        closed = Closed(
            decision, behind, now - self._started, weighted / (sum(tokens) or 1)
        )
        self.round += 1
        self._started = self._moved_at = now
        self._reports, self._finished = {}, {}
        return closed
