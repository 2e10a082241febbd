"""The coordinator's desk: messages in, decisions and orders out, the books kept.

:class:`Coordinator` decides; the chair hands its decisions to the outbox, notes numbers
and events, and says when the job is over.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from fabric.core.ids import PeerId
from fabric.jobs.coordinator import Coordinator
from fabric.jobs.effects import Diverged, Effect, Fact, Recorded
from fabric.jobs.ledger import Ledger
from fabric.jobs.liveness import Liveness
from fabric.jobs.messages import (
    Beat,
    Generation,
    Join,
    Leave,
    PeerFacts,
    RoundReport,
    Save,
    Saved,
    Setting,
    StateHeld,
)
from fabric.jobs.outbox import Outbox
from fabric.jobs.quorum import electors, has_majority
from fabric.jobs.saving import Saves
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import Pause, Trigger
from fabric.jobs.steering import value_at
from fabric.jobs.succession import no_quorum

Upward = RoundReport | StateHeld | PeerFacts | Saved | Join | Leave
"""What participants and newcomers tell the coordinator."""


class Chair:
    """Coordinate one generation.

    Args:
        me: This peer, which the generation names as coordinator.
        generation: It.
        spec: The job's spec.
        ledger: The job's numbers.
        outbox: Where orders go.
        effects: Where events go.
        liveness: Who answers; watches this generation's electors.
        settings: What people want to be in force from the next decision on.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        me: PeerId,
        generation: Generation,
        spec: JobSpec,
        *,
        ledger: Ledger,
        outbox: Outbox,
        effects: list[Effect],
        liveness: Liveness,
        settings: Callable[[], tuple[Setting, ...]],
        now: float,
    ) -> None:
        self._me, self._generation, self._spec = me, generation, spec
        self._ledger, self._outbox, self._effects = ledger, outbox, effects
        self._liveness = liveness
        self._settings = settings
        self._in_force = generation.settings
        self.role = Coordinator(generation, spec, now)
        self._beat_due = now
        self._asked_saver: PeerId | None = None
        self._saves = Saves(generation.job, spec)
        self.verdict: tuple[Trigger, str] | None = None

    def missing(self, now: float) -> tuple[PeerId, ...]:
        """Return the lost electors, if those we hear are no majority."""
        group, lost = electors(self._generation), self._liveness.lost(now)
        return () if has_majority(group, group - lost) else tuple(sorted(lost))

    def pause(self, now: float) -> Pause | None:
        """Return why nothing is decided, or less than could be; None if all is well."""
        if missing := self.missing(now):
            return no_quorum(missing)
        return self.role.waiting(self._live(now))

    def _live(self, now: float) -> frozenset[PeerId]:
        return self.role.participants - self._liveness.lost(now)

    def wanted(self, now: float, *, fenced: bool) -> tuple[PeerId, ...] | None:
        """Return who should be in a new generation; None when none is wanted now.

        Args:
            now: Monotonic seconds.
            fenced: Whether a later epoch was promised, so this one cannot go on.
        """
        if not fenced and not self.role.change_wanted(self._live(now), now):
            return None
        lost = () if self.role.genesis else self._liveness.lost(now)
        return tuple(p for p in self.role.wanted() if p not in lost)

    def take(self, sender: PeerId, message: Upward, now: float) -> None:
        """Take a message of this epoch."""
        role = self.role
        match message:
            case RoundReport():
                role.report(sender, message, now)
            case StateHeld():
                self._on_held(sender, message)
            case PeerFacts():
                self._ledger.peer_facts(sender, message.facts)
            case Saved():
                self._on_saved(sender, message)
            case Join():
                role.join(sender)
            case Leave():
                role.leave(sender, failed=message.failed)

    def _on_held(self, sender: PeerId, held: StateHeld) -> None:
        if wrong := self.role.held(sender, held):
            self._effects.append(Diverged(wrong))
            self._record("diverged", sender, {"round": held.round, "peers": wrong})
        if self._ledger.held(held) and held.validation_loss is not None:
            facts = {"round": held.round, "validation_loss": held.validation_loss}
            self._record("validated", sender, dict(facts))

    def beat(
        self, missing: tuple[PeerId, ...], now: float, to: PeerId | None = None
    ) -> None:
        """Tell the others that we live, if it is time to; tell ``to`` at once."""
        if self.role.genesis or (to is None and now < self._beat_due):
            return
        generation = self._generation
        others = electors(generation) - {self._me}
        if to is None:
            self._beat_due = now + self._spec.fault.patience_seconds / 4
        beat = Beat(
            generation.job,
            generation.counter,
            self.role.table.round,
            missing,
            self._ledger.totals(),
        )
        for peer in sorted(others if to is None else others & {to}):
            self._outbox.put(peer, "beat", beat, now)

    def decide(self, now: float) -> None:
        """Decide the round, or complete the job, if either can be done now."""
        live = self._live(now)
        closed = self.role.decide(live, now)
        working = live - self.role.broken
        if closed is not None:
            self._take_settings(closed.decision.round)
            self._saves.decided(closed.decision.round + 1, now)
            decision = replace(
                closed.decision,
                tokens_before=self._ledger.tokens,
                settings=self._in_force,
            )
            self._record("round", self._me, self._ledger.closed(closed))
            for peer in self._generation.participants:
                self._outbox.put(peer, "decision", decision, now)
        elif finishers := self.role.finishers(working, now):
            self._complete(finishers, len(working), now)
        order = self._saves.next_order(self.role.held_rounds(), working, now)
        if order is not None:
            self._ask_save(order.peer, order.round, now)

    def _take_settings(self, at: int) -> None:
        """Put what people set into force, once per decision, and note who did."""
        wanted = self._settings()
        for setting in wanted:
            if setting not in self._in_force:
                facts: dict[str, Fact] = {"path": setting.path, "value": setting.value}
                self._record("steered", setting.author, {**facts, "round": at})
        paths = {setting.path for setting in wanted}
        for setting in self._in_force:
            if setting.path not in paths:
                back: Fact = value_at(self._spec, setting.path)
                facts = {"path": setting.path, "value": back, "round": at}
                self._record("steered", setting.author, facts)
        self._in_force = wanted

    def _complete(
        self, finishers: frozenset[PeerId], num_live: int, now: float
    ) -> None:
        saver = self.role.saver(finishers)
        if saver is None:
            reason = "no participant could write the checkpoint"
            self.verdict = (Trigger.BROKE, reason)
        elif saver != self._asked_saver:
            self._asked_saver = saver
            self._ledger.put("parameter_digest", self.role.final_digest(finishers))
            self._ledger.put("peers_equal", len(finishers))
            if len(finishers) < num_live:
                self._ledger.put("peers_behind", num_live - len(finishers))
            rounds = self.role.table.round
            self._ask_save(saver, rounds, now)

    def _ask_save(self, saver: PeerId, rounds: int, now: float) -> None:
        save = Save(self._generation.job, self._generation.counter, rounds)
        self._outbox.put(saver, f"save {rounds}", save, now)

    def save_refused(self, sender: PeerId, round_number: int) -> None:
        """``sender`` does not save under this epoch: it restarted, say."""
        if self._saves.answered(sender, round_number, saved=False):
            return
        if sender == self._asked_saver:
            self.role.save_failed(sender)

    def _on_saved(self, sender: PeerId, saved: Saved) -> None:
        known = self._saves.answered(sender, saved.round, saved=bool(saved.root))
        last = sender == self._asked_saver and saved.round == self.role.table.round
        if not known and not last:
            return
        if not saved.root:
            if last:
                self.role.save_failed(sender)
            facts: dict[str, Fact] = {"reason": saved.reason, "round": saved.round}
            self._record("save_failed", sender, facts)
            return
        self._ledger.put("checkpoint", saved.root)
        self._ledger.put("checkpoint_round", saved.round)
        if not last:
            facts = {"root": saved.root, "round": saved.round}
            self._record("checkpoint", sender, facts)
            return
        self._ledger.put("rounds", saved.round)
        self.verdict = (Trigger.COMPLETED, "")

    def _record(self, kind: str, peer: PeerId, facts: dict[str, Fact]) -> None:
        self._effects.append(Recorded(kind, peer, facts))
