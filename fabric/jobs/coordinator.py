"""The coordinator's part in one generation: rounds, membership changes, completion.

Created when a generation that names us is committed, dropped when the next one is: what
it knows beyond the generation comes from messages, so a successor starts from reports.

    collecting --decision--> [boundary] --> collecting ... --last decision--> finishing
                                 |                                               |
                     newcomers, leavers, behind:                  all hold one digest:
                     a new generation is wanted                   save, then complete

A lost participant, or one whose worker failed, is acted on at once; everything else
waits for a boundary: the time after a decision, when all hold the next round's state.
"""

from __future__ import annotations

from collections import Counter

from fabric.core.digest import rendezvous_order
from fabric.core.ids import PeerId, short
from fabric.jobs.messages import Generation, RoundReport, StateHeld
from fabric.jobs.rounds import Closed, RoundTable
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import Pause

Peers = frozenset[PeerId]
NOBODY: Peers = frozenset()

MAX_NAMED_LINKS = 8
"""Cut worker links that a pause names."""

FINAL_WAIT = 4
"""Patiences to wait, after the last round, for those who do not hold its result yet."""


def max_participants(spec: JobSpec) -> int:
    """Return the most participants of a generation: one per stage, if there are any."""
    return spec.serve.stages if spec.kind == "serve" else spec.require.max_peers


class Coordinator:
    """Decide for one generation.

    Args:
        generation: It names us as coordinator.
        spec: The job's spec.
        now: Monotonic seconds.
    """

    def __init__(self, generation: Generation, spec: JobSpec, now: float) -> None:
        self.generation = generation
        self._spec = spec
        self._patience = spec.fault.patience_seconds
        rounds = spec.train.outer.rounds if spec.kind == "train" else 0
        self.table = RoundTable(generation, rounds, self._patience, now)
        self.joiners: dict[PeerId, None] = {}
        self.leavers: set[PeerId] = set()
        self.broken: set[PeerId] = set()
        self.behind: set[PeerId] = set()
        self._held: dict[PeerId, tuple[int, str]] = {}
        self._diverged: set[PeerId] = set()
        self._boundary_at: float | None = None
        self._over_at = now
        self._refused_savers: set[PeerId] = set()

    @property
    def participants(self) -> Peers:
        """Participants of the generation."""
        return frozenset(self.generation.participants)

    @property
    def genesis(self) -> bool:
        """Whether this is the implied first generation, in which nobody works yet."""
        return self.generation.counter == 0

    # -- facts from participants

    def join(self, peer: PeerId) -> None:
        """``peer`` asks to take part; a participant asking has lost its state."""
        returns = peer in self.participants
        if returns and not self.genesis:
            self.broken.add(peer)
        if returns or len(self.joiners) < self._spec.require.max_peers:
            self.joiners[peer] = None

    def leave(self, peer: PeerId, *, failed: bool) -> None:
        """``peer`` asks to be left out; at once when its worker ``failed``."""
        self.joiners.pop(peer, None)
        if peer in self.participants:
            (self.broken if failed else self.leavers).add(peer)

    def report(self, peer: PeerId, report: RoundReport, now: float) -> bool:
        """Take a round report; False when it is of another epoch or round."""
        return self.table.report(peer, report, now)

    def held(self, peer: PeerId, held: StateHeld) -> int:
        """Note which state ``peer`` holds; return how many more hold a wrong one.

        Wrong is what fewer participants hold, ties to the higher digest; judged once
        more than half agree or all have spoken, so that the order they speak in does
        not matter.
        """
        if held.counter != self.generation.counter or peer not in self.participants:
            return 0
        self._held[peer] = (held.round, held.state_digest)
        spoke = {p: d for p, (r, d) in self._held.items() if r == held.round}
        votes = Counter(spoke.values())
        right = max(votes, key=lambda d: (votes[d], d))
        num = len(self.participants)
        known = self._diverged
        if 2 * votes[right] > num or len(spoke) == num:
            wrong = {p for p, d in spoke.items() if d != right}
            self._diverged = (known - spoke.keys()) | wrong
        if held.round >= self.table.round:  # an older state is no catching up
            self.behind -= spoke.keys()
        self.behind |= self._diverged
        return len(self._diverged - known)

    def held_rounds(self) -> dict[PeerId, int]:
        """Return which round's state each participant said it holds."""
        return {peer: held for peer, (held, _) in self._held.items()}

    # -- decisions

    def decide(self, live: Peers, now: float) -> Closed | None:
        """Return the round's decision, unless a membership change comes first."""
        if self.genesis:
            return None
        if self._boundary_at is not None:
            if self._changes(live):
                return None
            self._boundary_at = None  # whom it waited for caught up, or went
        closed = self.table.decide(live - self.broken, now)
        if closed is not None:
            self._over_at = now
            self.behind |= closed.behind
            if self._changes(live):
                self._boundary_at = now
        return closed

    def _changes(self, live: Peers) -> bool:
        room = len(live) < self._spec.require.max_peers
        newcomers = bool(self.joiners) and room and not self.table.over
        return newcomers or bool(self.leavers) or bool(self.behind & live)

    def change_wanted(self, live: Peers, now: float) -> str:
        """Return why a new generation is wanted now, or an empty string."""
        if self.genesis:
            ready = self.starters() >= self.needed
            return "enough peers are there" if ready else ""
        if self._spec.kind == "serve":
            return self._replacement_wanted(live)
        if self.broken:
            return "a worker failed or restarted"
        if self.table.over:
            return "a participant holds another state" if self.behind & live else ""
        if self.participants - live:
            return "a participant is lost"
        if self._boundary_at is None or not self._settled(live, now):
            return ""
        return "participants join, leave or fetch" if self._changes(live) else ""

    @property
    def needed(self) -> int:
        """Peers without which the job does not start."""
        stages = self._spec.serve.stages if self._spec.kind == "serve" else 1
        return max(self._spec.require.min_peers, stages)

    def starters(self) -> int:
        """Return how many peers could start the job now."""
        return len(self.participants | self.joiners.keys())

    def _replacement_wanted(self, live: Peers) -> str:
        if (self.participants - live) or self.broken or self.leavers:
            return "a stage is lost"
        short = len(self.participants) < self._spec.serve.stages
        return "a stage is vacant" if short and self.joiners else ""

    def _settled(self, live: Peers, now: float) -> bool:
        """Whether all who can hold the state of the current round."""
        assert self._boundary_at is not None
        if now - self._boundary_at >= self._patience:
            return True
        expected = live - self.behind - self.broken
        return all(self._held.get(p, (-1,))[0] >= self.table.round for p in expected)

    def wanted(self) -> tuple[PeerId, ...]:
        """Return who should be in the next generation, in order of preference."""
        failed = self.broken - self.joiners.keys()
        staying = [
            p
            for p in self.generation.participants
            if p not in self.leavers and p not in failed
        ]
        newcomers = [p for p in self.joiners if p not in self.participants]
        return (*staying, *newcomers)

    # -- completion

    def finishers(self, live: Peers, now: float) -> Peers:
        """Return who completes the job: all ``live``, once they hold one last state.

        Past FINAL_WAIT patiences, those of the state that most hold, ties to the higher
        digest: a participant that is cut off from the others' workers ends nothing.
        """
        if self.genesis or self._spec.kind != "train" or not self.table.over:
            return NOBODY
        holders: dict[str, set[PeerId]] = {}
        for peer in live & self._held.keys():
            at, digest = self._held[peer]
            if at >= self.table.round:
                holders.setdefault(digest, set()).add(peer)
        most = max(holders, key=lambda d: (len(holders[d]), d), default="")
        chosen = frozenset(holders.get(most, ()))
        late = now - self._over_at >= FINAL_WAIT * self._patience
        return chosen if chosen == live or late else NOBODY

    def final_digest(self, finishers: Peers) -> str:
        """Return the digest that all ``finishers`` hold."""
        return next(self._held[p][1] for p in sorted(finishers))

    def saver(self, live: Peers) -> PeerId | None:
        """Return who writes the checkpoint; None when every live one failed to."""
        names = rendezvous_order(
            self.generation.job.encode(), live - self._refused_savers
        )
        return PeerId(names[0]) if names else None

    def save_failed(self, peer: PeerId) -> None:
        """``peer`` could not write the checkpoint: somebody else may."""
        self._refused_savers.add(peer)

    def waiting(self, live: Peers) -> Pause | None:
        """Return why the job has not started, or goes on with less than it has."""
        have, need = self.starters(), self.needed
        if self.genesis and have < need:
            return Pause(
                "waiting_for_peers",
                f"{have} of {need} peers are there",
                "start more peers, or submit with a lower require.min_peers",
            )
        if not self.genesis and (cut := self.table.cut_links(live)):
            links = ", ".join(
                f"{short(one)}-{short(other)}" for one, other in cut[:MAX_NAMED_LINKS]
            )
            return Pause(
                "worker_link_cut",
                f"workers cannot reach each other: {links}; those who share "
                "contributions decide the rounds, the others fetch",
                "fabric why PEER shows the path to a peer; open a port or add a relay",
            )
        return None
