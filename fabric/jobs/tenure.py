"""One peer's role in the newest generation of a job, and how the next one comes about.

Campaigns when the coordinator is silent, or, as coordinator, when a change is wanted;
enters what was committed; presides if it names us; ends the job.
"""

from __future__ import annotations

import random

from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import JobId, PeerId
from fabric.jobs.chair import Chair, Upward
from fabric.jobs.coordinator import max_participants
from fabric.jobs.effects import (
    Apply,
    Effect,
    Ended,
    Fact,
    Persist,
    Publish,
    Recorded,
    Restore,
    Retire,
)
from fabric.jobs.ending import Outcome
from fabric.jobs.event_log import names_of
from fabric.jobs.ledger import Ledger
from fabric.jobs.liveness import Liveness
from fabric.jobs.membership import Membership
from fabric.jobs.messages import (
    Commit,
    Done,
    Finished,
    Generation,
    JobMessage,
    Join,
    Leave,
    Nack,
    Save,
    Setting,
    Standing,
)
from fabric.jobs.outbox import Outbox
from fabric.jobs.participant import Participant
from fabric.jobs.promises import Acceptor, PromiseRecord, genesis_of
from fabric.jobs.proposer import E_STATE_LOST, NOBODY, STATE_LOST, Wish, check_commit
from fabric.jobs.quorum import electors
from fabric.jobs.restoration import Restoration, Restored
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import JobState, Pause, Trigger, advance
from fabric.jobs.succession import Succession

REASON_FACT = "reason"
"""Why a job ended, among the facts of its status."""


class Tenure:
    """What one peer is in one job: candidate, participant, perhaps coordinator.

    Args:
        me: This peer.
        job: The job.
        spec: Its spec.
        record: Persisted promises, or None when we never promised anything.
        now: Monotonic seconds.
        seed: Of the back-off's jitter.
    """

    def __init__(
        self,
        me: PeerId,
        job: JobId,
        spec: JobSpec,
        *,
        record: PromiseRecord | None,
        now: float,
        seed: int,
    ) -> None:
        self.me, self.job, self.spec = me, job, spec
        rng = random.Random(f"{seed}:{self.me}:{job}")
        patience = spec.fault.patience_seconds
        self.acceptor = Acceptor(job, genesis_of(job, spec), record)
        self.outbox = Outbox(patience / 4)
        self.effects: list[Effect] = []
        self.ledger = Ledger()
        self.liveness = Liveness(patience)
        self.succession = Succession(self.me, patience, rng, now)
        self.membership = Membership(patience, now)
        self.restoration = Restoration(spec.resume_round, patience)
        self.members: frozenset[PeerId] = frozenset()
        self.settings: tuple[Setting, ...] = ()
        self.chair: Chair | None = None
        # after a restart nothing is held and no round's reports are known
        resumed = record is not None and self.committed.counter > 0
        begun = self.committed.counter > 0
        self.outcome = Outcome(job, JobState.RUNNING if begun else JobState.QUEUED)
        self.part = Participant(
            self.me,
            job,
            acceptor=self.acceptor,
            succession=self.succession,
            membership=self.membership,
            ledger=self.ledger,
            effects=self.effects,
            patience=patience,
            now=now,
            resumed=resumed,
        )
        if not resumed:
            self._take_role(now)

    @property
    def committed(self) -> Generation:
        """Newest generation we know to be committed."""
        return self.acceptor.committed

    @property
    def over(self) -> bool:
        """Whether the job ended."""
        return self.outcome.over

    # -- the coordinator's ear

    def tell(self, name: str, message: Upward, now: float) -> None:
        """Send ``message`` to the coordinator, who may be ourselves."""
        if self.over:
            return
        if self.committed.coordinator == self.me:
            self.coordinate(self.me, message, now)
        else:
            self.outbox.put(self.committed.coordinator, name, message, now)

    def coordinate(self, sender: PeerId, message: Upward, now: float) -> JobMessage:
        """Take a participant's message as coordinator."""
        mine = self.committed.counter
        counter = mine if isinstance(message, Join | Leave) else message.counter
        if counter > mine:
            return self.acceptor.refuse("E_NOT_YET", f"epoch {counter} is unknown here")
        if self.chair is None or counter < mine:
            return self.acceptor.refuse("E_NOT_COORDINATOR", "not under this epoch")
        self.chair.take(sender, message, now)
        return Done()

    def save_refused(self, peer: PeerId, save: Save) -> None:
        """``peer`` does not write the checkpoint."""
        if self.chair is not None and save.counter == self.committed.counter:
            self.chair.save_refused(peer, save.round)

    # -- generations

    def audience(self) -> frozenset[PeerId]:
        """Return who votes on the next generation."""
        return electors(self.committed)

    def note_promise(self, peer: PeerId, reply: Standing | Nack) -> None:
        """Remember the highest epoch an elector promised."""
        if peer in self.audience():
            self.succession.highest_seen = max(
                self.succession.highest_seen, reply.promised
            )

    def learn(self, commit: Commit, now: float) -> None:
        """Adopt a newer committed generation."""
        if commit.generation.counter <= self.committed.counter or self.over:
            return
        try:
            check_commit(commit, self.committed)
            record = self.acceptor.on_commit(commit)
        except (IntegrityError, RemoteProtocolError) as exc:
            self.record("commit_refused", None, {"reason": exc.reason})
            return
        if record is not None:
            self.effects.append(Persist(record))
            self._enter(commit.generation, now)

    def _enter(self, generation: Generation, now: float) -> None:
        """Act, or stop acting, in a generation we just adopted."""
        self.succession.entered(now)
        self.outbox.clear()
        reached = max(self.restoration.reached, self.part.decided + 1)
        self.part.enter(generation)
        self.outcome.started()
        self.ledger.start(now)
        self._take_role(now)
        self.record(
            "generation",
            generation.coordinator,
            {
                "counter": generation.counter,
                "participants": len(generation.participants),
                "peers": names_of(generation.participants),
                "round": generation.base_round,
            },
        )
        if not generation.state_digest and reached > generation.base_round:
            reason = f"nobody holds a state of round {reached} or before, no checkpoint"
            facts: dict[str, Fact] = {"round": generation.base_round, "reason": reason}
            self.record("restarted", generation.coordinator, facts)
        if self.chair is not None:
            self.effects.append(Publish(generation))
        if self.me not in generation.participants:
            self.part.drop()
            self.effects.append(Retire())
        elif self.part.takes_part:
            self.effects.append(Apply(generation))
            if self.membership.leaving:
                self.tell("leave", Leave(self.job), now)
            if (held := self.part.base_held()) is not None:
                self.tell("held", held, now)

    def _take_role(self, now: float) -> None:
        generation = self.committed
        mine = generation.coordinator == self.me and not self.acceptor.fenced
        self.chair = self._take_chair(now) if mine else None
        self.part.presides = mine
        self.liveness.watch(electors(generation) - {self.me} if mine else (), now)

    def _take_chair(self, now: float) -> Chair:
        return Chair(
            self.me,
            self.committed,
            self.spec,
            ledger=self.ledger,
            outbox=self.outbox,
            effects=self.effects,
            liveness=self.liveness,
            settings=lambda: self.settings,
            now=now,
        )

    # -- time

    def tick(self, now: float) -> None:
        """Do what is due."""
        self._take_restored(now)
        self.conclude_campaign(now)
        if (facts := self.part.due_facts(now)) is not None:
            self.tell("facts", facts, now)
        if self.chair is not None:
            self._coordinate_tick(self.chair, now)
        elif self.me in self.committed.participants:
            self._candidate_tick(now)
        if not self.over:
            self._ask_to_join(now)

    def _ask_to_join(self, now: float) -> None:
        """Ask the coordinator for a place, until a generation lists us."""
        placed = self.part.takes_part
        has_state = self.part.held.has_state
        if not self.membership.asks(now, placed=placed, has_state=has_state):
            return
        mine = self.me in self.committed.participants
        if mine and not placed and self.acceptor.fenced:
            return  # our promise is about a generation that will list us
        target = self.membership.hint or self.committed.coordinator
        self.membership.asked(target, now)
        if self.me not in (target, self.committed.coordinator):
            self.outbox.put(target, "join", Join(self.job), now)
        elif self.chair is not None:
            self.coordinate(self.me, Join(self.job), now)

    # -- candidate

    def _candidate_tick(self, now: float) -> None:
        ours = self.committed.coordinator == self.me  # restarted, or fenced
        if ours or self.succession.due(self.committed, now):
            self._start_campaign(now, self.committed.participants)

    def _start_campaign(self, now: float, wanted: tuple[PeerId, ...]) -> None:
        if self.part.applying(now):
            return
        wish = Wish(
            participants=wanted,
            max_peers=max_participants(self.spec),
            members=self.members,
            avoid_coordinator=self.me not in wanted,
            depose=self.committed.coordinator == self.me,
            settings=self.part.settings,
            first_round=self.spec.resume_round,
            checkpoint=self.restoration.checkpoint,
        )
        promised = self.acceptor.promised
        self.succession.start(self.committed, wish, promised, now)

    def refusal(self, generation: Generation, now: float) -> Nack | None:
        """Return why we do not promise ``generation`` now, or None."""
        if self.part.applying(now):
            return self.acceptor.refuse("E_BUSY", "applying a decision")
        at = self.restoration.checkpoint
        if not generation.state_digest and at > generation.base_round:
            reason = f"there is a checkpoint of round {at}"
            return self.acceptor.refuse(E_STATE_LOST, reason)
        return None

    def conclude_campaign(self, now: float) -> None:
        """Act on the end of a campaign, if one ended."""
        campaign = self.succession.conclude(now)
        if campaign is None:
            return
        if campaign.commit is not None:
            self._won(campaign.commit, electors(campaign.base), now)
        elif campaign.newer is not None:
            self.learn(campaign.newer, now)
        elif campaign.reason == STATE_LOST or (
            campaign.reason == NOBODY and self.membership.failure
        ):
            self._state_lost(now)

    def _state_lost(self, now: float) -> None:
        """Go on from the newest checkpoint, as long as a worker may still work here."""
        failure, restoration = self.membership.failure, self.restoration
        if failure and (self.membership.gave_up or not restoration.possible):
            self.end(Trigger.BROKE, failure, now)
            return
        if restoration.begin(now):
            self.record("state_lost", None, {"checkpoint": restoration.checkpoint})
            self.effects.append(Restore())
        self.succession.blocked = restoration.pause

    def _take_restored(self, now: float) -> None:
        match self.restoration.take(now):
            case Restored(held, root):
                facts: dict[str, Fact] = {"round": held.round, "root": root}
                self.record("restored", self.me, facts)
                if not self.part.held.has_state:
                    self.part.held = held
                if self.me in self.committed.participants:
                    self.tell("join", Join(self.job), now)
            case Pause(code=code, reason=reason):
                facts = {"reason": f"{code}: {reason}"[:500]}
                self.record("restore_failed", self.me, facts)
            case None:
                pass

    def _won(self, commit: Commit, before: frozenset[PeerId], now: float) -> None:
        self.learn(commit, now)
        if self.committed is commit.generation:
            for peer in sorted(before | self.audience()):
                if peer != self.me:
                    self.outbox.put(peer, "commit", commit, now)

    # -- coordinator

    def _coordinate_tick(self, chair: Chair, now: float) -> None:
        missing = chair.missing(now)
        chair.beat(missing, now)
        if missing:
            return
        seen = max(self.acceptor.promised, self.succession.highest_seen)
        wanted = chair.wanted(now, fenced=seen > self.committed.counter)
        if wanted is not None:
            self._start_campaign(now, wanted)
        elif self.succession.campaign is None:
            chair.decide(now)
        if chair.verdict is not None:
            self.end(*chair.verdict, now)

    # -- the end

    def end(self, trigger: Trigger, reason: str, now: float) -> None:
        """End the job as its coordinator and tell everybody."""
        state = advance(self.outcome.state, trigger)
        tell = self.audience() | (
            self.chair.role.joiners.keys() if self.chair else set()
        )
        self.outbox.clear()
        if reason:
            self.ledger.put(REASON_FACT, reason[:500])
        self.adopt_end(state, reason)
        self.effects.append(Publish())
        finished = self.finished(now)
        for peer in sorted(tell - {self.me}):
            self.outbox.put(peer, "finished", finished, now)

    def finished(self, now: float) -> Finished:
        """Return the message that tells others of the end."""
        return self.outcome.finished(self.committed.counter, self.ledger.facts(now))

    def follow_end(self, finished: Finished) -> None:
        """Take over how the coordinator says that the job ended, and its numbers."""
        self.ledger.adopt(finished.facts)
        self.adopt_end(JobState(finished.state), finished.reason)

    def adopt_end(self, state: JobState, reason: str) -> None:
        """Follow the end of the job."""
        if not self.outcome.adopt(state, reason):
            return
        self.succession.campaign, self.chair = None, None
        self.part.presides = False
        self.outbox.clear()
        self.record(state.value, self.me, {"reason": reason} if reason else {})
        self.effects += [Retire(), Ended(state)]

    def record(self, kind: str, peer: PeerId | None, facts: dict[str, Fact]) -> None:
        """Note an event for the job's log."""
        self.effects.append(Recorded(kind, peer, facts))
