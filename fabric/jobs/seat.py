"""One peer's seat in one job: acceptor, candidate, participant, perhaps coordinator.

Pure: messages, answers, runner events and ``now`` come in; :meth:`Seat.poll` returns
what to do and to send, :meth:`Seat.next_timeout` when to call again. The shell performs
the effects of a poll in order, and only then answers or sends.

Rules. (1) Only the newest committed generation acts, and only while no higher epoch was
promised (*fenced*). (2) A coordinator that restarted never acts under its old epoch: it
campaigns for a new one. (3) A coordinator decides only while it hears a majority of its
electors. (4) While a decision is being applied, a peer does not say what it holds, so
acks never lie about it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec.structs import replace

from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import JobId, PeerId, short
from fabric.core.signing import Signer, seal
from fabric.jobs.chair import Chair, Upward
from fabric.jobs.coordinator import max_participants
from fabric.jobs.effects import (
    Apply,
    Decide,
    Effect,
    Ended,
    Outputs,
    Persist,
    Publish,
    Recorded,
    Retire,
    SaveState,
)
from fabric.jobs.ledger import Ledger
from fabric.jobs.liveness import Liveness
from fabric.jobs.messages import (
    ACK_BODY,
    KIND_ACK,
    Ack,
    AckBody,
    Beat,
    Commit,
    Done,
    Finished,
    Generation,
    Inquire,
    JobMessage,
    Join,
    Leave,
    Nack,
    PeerFacts,
    Propose,
    RoundDecision,
    RoundReport,
    Save,
    Saved,
    Standing,
    StateHeld,
)
from fabric.jobs.outbox import Outbox
from fabric.jobs.promises import Acceptor, Held, PromiseRecord
from fabric.jobs.proposer import NOBODY, Wish, check_commit
from fabric.jobs.quorum import electors, has_majority
from fabric.jobs.runner import (
    RunnerEvent,
    RunnerFailed,
    RunnerProgress,
    RunnerResult,
)
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import JobState, JobStatus, Pause, Trigger, advance, is_over
from fabric.jobs.succession import Succession, no_quorum

RETRY = ("E_NOT_YET", "E_BUSY", "E_UNKNOWN_JOB")
"""Refusals that end by themselves: the receiver is about to learn what it lacks."""

MAX_NAMED = 50
"""Participants named in an event: 9 characters each, a fact has at most 500."""

REASON_FACT = "reason"
"""Why a job ended, among the facts of its status."""
MAX_WORKER_FAILURES = 3
"""After so many failed workers this peer no longer asks to take part."""

END: dict[JobState, Literal["done", "failed", "cancelled"]] = {
    JobState.DONE: "done",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


def genesis_of(job: JobId, spec: JobSpec) -> Generation:
    """Return generation 0, implied by the spec: the submitter alone."""
    submitter = PeerId(spec.submitter)
    return Generation(job, 0, submitter, (submitter,), 0, "", (), "")


class Seat:
    """See the module's docstring.

    Args:
        job: The job.
        spec: Its spec.
        signer: Signs our acks.
        record: Persisted promises, or None when we never promised anything.
        now: Monotonic seconds.
        seed: Of the back-off's jitter.
    """

    def __init__(
        self,
        job: JobId,
        spec: JobSpec,
        signer: Signer,
        *,
        record: PromiseRecord | None,
        now: float,
        seed: int,
    ) -> None:
        self.job, self.spec, self.me = job, spec, signer.peer_id
        self._signer = signer
        rng = random.Random(f"{seed}:{self.me}:{job}")
        self._patience = spec.fault.patience_seconds
        self.acceptor = Acceptor(job, genesis_of(job, spec), record)
        self._outbox = Outbox(self._patience / 4)
        self._effects: list[Effect] = []
        self.ledger = Ledger()
        self.state = JobState.QUEUED
        self.reason = ""
        self._liveness = Liveness(self._patience)
        self._succession = Succession(self.me, self._patience, rng, now)
        self._chair: Chair | None = None
        self._members: frozenset[PeerId] = frozenset()
        self._joins = False
        self._join_due = now
        self._join_hint: PeerId | None = None
        self._worker_failures = 0
        self._worker_failure = ""
        self._leaving = False
        self._held = Held()
        self._decided = -1
        self._busy: tuple[int, float] | None = None
        self._facts: dict[str, str | int | float | bool] = {}
        self._facts_due = now
        self._saving = False
        # after a restart nothing is held and no round's reports are known
        self._resumed = record is not None and self.committed.counter > 0
        if self.committed.counter > 0:
            self.state = JobState.RUNNING
        if not self._resumed:
            self._take_role(now)

    # -- what others may read

    @property
    def committed(self) -> Generation:
        """Newest generation we know to be committed."""
        return self.acceptor.committed

    @property
    def coordinates(self) -> bool:
        """Whether we coordinate the newest generation and may act."""
        return self._chair is not None and not self.acceptor.fenced

    @property
    def takes_part(self) -> bool:
        """Whether we are a participant of the newest generation, and it acts."""
        mine = self.me in self.committed.participants and self.committed.counter > 0
        return mine and not self._resumed and not self.acceptor.fenced

    @property
    def over(self) -> bool:
        """Whether the job ended."""
        return is_over(self.state)

    @property
    def idle(self) -> bool:
        """Whether the job ended and everybody who should know was told."""
        return self.over and self._outbox.empty

    @property
    def held(self) -> Held:
        """Newest state our runner holds."""
        return self._held

    def pause(self, now: float) -> Pause | None:
        """Return why nothing happens, or None."""
        if self.over:
            return None
        if self._chair is not None:
            missing = self._missing(now)
            live = frozenset(self.committed.participants) - self._liveness.lost(now)
            pause = no_quorum(missing) if missing else self._chair.role.waiting(live)
            return pause or self._succession.blocked
        return self._succession.blocked

    def status(self, now: float) -> JobStatus:
        """Return what the status slot should say."""
        return JobStatus(
            state=self.state,
            counter=self.committed.counter,
            coordinator=self.committed.coordinator,
            round=min(self._decided + 1, self.rounds),
            rounds=self.rounds,
            pause=self.pause(now),
            facts=self.ledger.slot_facts(now),
        )

    @property
    def rounds(self) -> int:
        """Rounds of the whole run; 0 for a kind without rounds."""
        return self.spec.train.outer.rounds if self.spec.kind == "train" else 0

    # -- orders from our own daemon

    def set_members(self, members: Iterable[PeerId]) -> None:
        """Say who is in the mesh: candidates for a witness."""
        self._members = frozenset(members)

    def set_joining(self, joins: bool, hint: PeerId | None, now: float) -> None:
        """Say whether we want to take part, and whom to ask if we know better."""
        self._join_hint = hint
        if joins and not self._joins:
            self._join_due = now
        self._joins = joins

    def leave(self, now: float, *, failed: bool = False, reason: str = "") -> None:
        """Ask to be left out; at once when our worker ``failed``."""
        self._leaving = not failed
        if not failed:
            self._joins = False
        if self.me in self.committed.participants:
            self._tell("leave", Leave(self.job, failed, reason[:500]), now)

    def stop(self, now: float) -> bool:
        """Cancel the job; False when only the coordinator can."""
        if not self.coordinates:
            return self.over
        self._end(Trigger.STOPPED, "stopped by a member", now)
        return True

    def learn_status(self, status: JobStatus) -> None:
        """Follow a replicated status that says the job ended."""
        if is_over(status.state) and not self.over:
            self._adopt_end(status.state, str(status.facts.get(REASON_FACT, "")))

    def saved(self, root: str, reason: str, now: float) -> None:
        """Our runner wrote the checkpoint ``root``, or failed to when it is empty."""
        self._saving = False
        at = self.committed.counter
        self._tell("saved", Saved(self.job, at, self.rounds, root, reason[:500]), now)

    # -- events of our runner

    def event(self, event: RunnerEvent, now: float) -> None:
        """Take a fact from our runner."""
        match event:
            case RoundReport():
                if event.counter == self.committed.counter:
                    self._tell("report", event, now)
            case StateHeld():
                self._on_held(event, now)
            case RunnerProgress() | RunnerResult():
                self._facts.update(event.facts)
                self._facts_due = min(self._facts_due, now + self._patience / 5)
            case RunnerFailed():
                self._on_worker_failed(event, now)

    def _on_held(self, event: StateHeld, now: float) -> None:
        generation = self.committed
        base = (generation.base_round, generation.state_digest)
        state = (event.round, event.state_digest)
        if event.counter < generation.counter and state != base:
            return  # of a generation that was rolled back meanwhile
        self._held = Held(event.round, event.state_digest, has_state=True)
        if self._busy is not None and event.round >= self._busy[0]:
            self._busy = None
        if self.takes_part:
            self._tell("held", replace(event, counter=generation.counter), now)

    def _on_worker_failed(self, event: RunnerFailed, now: float) -> None:
        self._worker_failures += 1
        self._held, self._busy = Held(), None
        reason = f"{event.code}: {event.reason}"[:500]
        self._worker_failure = reason
        self._record("worker_failed", self.me, {"reason": reason})
        self._effects.append(Retire())
        self.leave(now, failed=True, reason=reason)
        if self._worker_failures >= MAX_WORKER_FAILURES:
            self._joins = False
            self.reason = reason
        self._join_due = now + self._patience * 2**self._worker_failures / 4

    def _tell(self, name: str, message: Upward, now: float) -> None:
        """Send ``message`` to the coordinator, who may be ourselves."""
        if self.over:
            return
        if self.committed.coordinator == self.me:
            self._coordinate(self.me, message, now)
        else:
            self._outbox.put(self.committed.coordinator, name, message, now)

    # -- messages

    def receive(self, sender: PeerId, message: JobMessage, now: float) -> JobMessage:
        """Return the answer to ``message``; send it after the effects of a poll."""
        self._liveness.heard(sender, now)
        if self.over and not isinstance(message, Finished | Done):
            return self._finished()
        match message:
            case Propose():
                return self._on_propose(message, now)
            case Commit():
                return self._on_commit(message, now)
            case Inquire():
                return self._standing(message.counter, now)
            case Beat() | RoundDecision() | Save() | Finished():
                return self._obey(sender, message, now)
            case RoundReport() | StateHeld() | PeerFacts() | Saved() | Join() | Leave():
                return self._coordinate(sender, message, now)
            case Ack() | Nack() | Standing() | Done():
                raise RemoteProtocolError(f"{type(message).__name__} is an answer")

    def _obey(
        self,
        sender: PeerId,
        message: Beat | RoundDecision | Save | Finished,
        now: float,
    ) -> JobMessage:
        """Take a message that only a coordinator sends."""
        match message:
            case Beat():
                return self._on_beat(sender, message, now)
            case RoundDecision():
                return self._on_decision(sender, message, now)
            case Save():
                return self._on_save(sender, message)
            case Finished():
                return self._on_finished(sender, message)

    def _applying(self, now: float) -> bool:
        return self._busy is not None and now < self._busy[1]

    def _on_propose(self, propose: Propose, now: float) -> JobMessage:
        if self._applying(now):
            return self.acceptor.refuse("E_BUSY", "applying a decision")
        answer, record = self.acceptor.on_propose(propose, self._held)
        if record is not None:
            self._effects.append(Persist(record))
        if isinstance(answer, AckBody):
            return Ack(seal(self._signer, KIND_ACK, ACK_BODY.encode(answer)))
        return answer

    def _on_commit(self, commit: Commit, now: float) -> JobMessage:
        self._learn(commit, now)
        return Done()

    def _follows(self, now: float) -> bool:
        if self.committed.coordinator == self.me:
            return self.coordinates
        return now - self._succession.heard < 0.8 * self._patience

    def _standing(self, counter: int, now: float) -> Standing:
        newer = self.committed.counter > counter
        commit = self.acceptor.commit()
        return Standing(
            job=self.job,
            promised=self.acceptor.promised,
            held_round=self._held.round,
            held_digest=self._held.digest,
            has_state=self._held.has_state,
            follows=self._follows(now),
            busy=self._applying(now),
            committed=commit.generation if newer else None,
            proof=commit.acks if newer else (),
        )

    def _from_coordinator(
        self, sender: PeerId, counter: int, now: float
    ) -> Nack | None:
        """Return a refusal unless ``sender`` may command under epoch ``counter``."""
        generation = self.committed
        if counter > generation.counter:
            return self.acceptor.refuse("E_NOT_YET", f"epoch {counter} is unknown here")
        if counter < generation.counter or sender != generation.coordinator:
            reason = f"epoch {counter} of {short(sender)} is over"
            return self.acceptor.refuse("E_STALE", reason)
        self._succession.heard = now
        if self.acceptor.fenced:
            reason = f"promised epoch {self.acceptor.promised}"
            return self.acceptor.refuse("E_FENCED", reason)
        return None

    def _on_beat(self, sender: PeerId, beat: Beat, now: float) -> JobMessage:
        refusal = self._from_coordinator(sender, beat.counter, now)
        if refusal is not None and refusal.code == "E_STALE":
            return refusal
        self.ledger.adopt(beat.facts)
        self._succession.blocked = no_quorum(beat.missing) if beat.missing else None
        if self._resumed and self._joins:
            self._join_due = min(self._join_due, now)
        return self._standing(beat.counter, now)

    def _on_decision(
        self, sender: PeerId, decision: RoundDecision, now: float
    ) -> JobMessage:
        refusal = self._from_coordinator(sender, decision.counter, now)
        if refusal is not None:
            return refusal
        if not self.takes_part or decision.round <= self._decided:
            return Done()
        self._decided = decision.round
        self._busy = (decision.round + 1, now + self._patience)
        self.ledger.decided(decision)
        self._effects.append(Decide(decision))
        return Done()

    def _on_save(self, sender: PeerId, save: Save) -> JobMessage:
        acts = sender == self.committed.coordinator and self.takes_part
        if not acts or save.counter != self.committed.counter:
            return self.acceptor.refuse("E_STALE", f"epoch {save.counter} is over")
        if not self._saving:
            self._saving = True
            self._effects.append(SaveState(save.round))
        return Done()

    def _coordinate(self, sender: PeerId, message: Upward, now: float) -> JobMessage:
        """Take a participant's message as coordinator."""
        mine = self.committed.counter
        counter = mine if isinstance(message, Join | Leave) else message.counter
        if counter > mine:
            return self.acceptor.refuse("E_NOT_YET", f"epoch {counter} is unknown here")
        if self._chair is None or counter < mine:
            return self.acceptor.refuse("E_NOT_COORDINATOR", "not under this epoch")
        self._chair.take(sender, message, now)
        return Done()

    # -- answers to what we sent

    def replied(
        self, peer: PeerId, request: JobMessage, reply: JobMessage, now: float
    ) -> None:
        """``peer`` answered ``request``."""
        self._liveness.heard(peer, now)
        if isinstance(reply, Standing | Nack):
            self._note_promise(peer, reply)
        elif isinstance(reply, Finished):
            self._adopt_end(JobState(reply.state), reply.reason)
        if isinstance(request, Inquire | Propose):
            self._succession.replied(peer, request, reply, now)
            return
        retry = isinstance(reply, Nack) and reply.code in RETRY
        if retry:
            self._outbox.failed(peer, request, now)
        else:
            self._outbox.answered(peer, request)
        if isinstance(reply, Nack | Standing) and reply.committed is not None:
            self._learn(Commit(reply.committed, reply.proof), now)
        if isinstance(request, Save) and isinstance(reply, Nack) and not retry:
            self._save_refused(peer, request)

    def _save_refused(self, peer: PeerId, save: Save) -> None:
        if self._chair is not None and save.counter == self.committed.counter:
            self._chair.save_refused(peer)

    def failed(self, peer: PeerId, request: JobMessage, now: float) -> None:
        """``request`` did not reach ``peer``, or no answer came."""
        self._liveness.failed(peer)
        if isinstance(request, Inquire | Propose):
            self._succession.replied(peer, request, None, now)
        elif isinstance(request, Commit | Finished) and peer not in self._audience():
            self._outbox.answered(peer, request)  # it left; it will ask when it is back
        else:
            self._outbox.failed(peer, request, now)

    def _audience(self) -> frozenset[PeerId]:
        return electors(self.committed)

    def _note_promise(self, peer: PeerId, reply: Standing | Nack) -> None:
        if peer in self._audience():
            self._succession.highest_seen = max(
                self._succession.highest_seen, reply.promised
            )

    # -- generations

    def _learn(self, commit: Commit, now: float) -> None:
        """Adopt a newer committed generation."""
        if commit.generation.counter <= self.committed.counter or self.over:
            return
        try:
            check_commit(commit, self.committed)
            record = self.acceptor.on_commit(commit)
        except (IntegrityError, RemoteProtocolError) as exc:
            self._record("commit_refused", None, {"reason": exc.reason})
            return
        if record is not None:
            self._effects.append(Persist(record))
            self._enter(commit.generation, now)

    def _enter(self, generation: Generation, now: float) -> None:
        """Act, or stop acting, in a generation we just adopted."""
        self._succession.entered(now)
        self._busy = None
        self._resumed = self._saving = False
        self._outbox.clear()
        self._decided = generation.base_round - 1
        self.state = advance(self.state, Trigger.STARTED)
        self.ledger.start(now)
        if generation.base_round < self._held.round:
            self._held = Held()  # rolled back: our runner fetches the older state
        self._take_role(now)
        self._record(
            "generation",
            generation.coordinator,
            {
                "counter": generation.counter,
                "participants": len(generation.participants),
                "peers": names_of(generation.participants),
                "round": generation.base_round,
            },
        )
        if self._chair is not None:
            self._effects.append(Publish(generation))
        if not self.takes_part:
            if self.me not in generation.participants:
                self._held = Held()
                self._effects.append(Retire())
            return
        self._effects.append(Apply(generation))
        if self._leaving:
            self._tell("leave", Leave(self.job), now)
        base = (generation.base_round, generation.state_digest)
        if self._held.has_state and base == (self._held.round, self._held.digest):
            counter, (at, digest) = generation.counter, base
            self._tell("held", StateHeld(self.job, counter, at, digest), now)

    def _take_role(self, now: float) -> None:
        generation = self.committed
        mine = generation.coordinator == self.me and not self.acceptor.fenced
        self._chair = self._take_chair(now) if mine else None
        self._liveness.watch(electors(generation) - {self.me} if mine else (), now)

    def _take_chair(self, now: float) -> Chair:
        return Chair(
            self.me,
            self.committed,
            self.spec,
            ledger=self.ledger,
            outbox=self._outbox,
            effects=self._effects,
            now=now,
        )

    # -- time

    def poll(self, now: float) -> Outputs:
        """Do what is due and return everything to perform and to send."""
        sends: list[tuple[PeerId, JobMessage]] = []
        if not self.over:
            self._tick(now)
        while True:
            batch = self._outgoing(now)
            if not batch:
                break
            for peer, message in batch:
                if peer == self.me:
                    answer = self.receive(self.me, message, now)
                    self.replied(self.me, message, answer, now)
                else:
                    sends.append((peer, message))
            if not self.over:
                self._conclude_campaign(now)
        effects = tuple(self._effects)
        self._effects.clear()  # shared with the chair: never another list
        return Outputs(effects, tuple(sends))

    def _outgoing(self, now: float) -> list[tuple[PeerId, JobMessage]]:
        campaign = self._succession.campaign if not self.over else None
        return [*self._outbox.take(now), *(campaign.outgoing() if campaign else ())]

    def _tick(self, now: float) -> None:
        self._conclude_campaign(now)
        self._send_facts(now)
        if self._chair is not None:
            self._coordinate_tick(self._chair, now)
        elif self.me in self.committed.participants:
            self._candidate_tick(now)
        if not self.over:
            self._ask_to_join(now)

    def next_timeout(self, now: float) -> float:
        """Return when :meth:`poll` is due at the latest."""
        due = [now + self._patience / 4]
        if (outgoing := self._outbox.next_timeout()) is not None:
            due.append(outgoing)
        if (campaign := self._succession.campaign) is not None:
            due.append(campaign.deadline)
        if self._chair is not None:
            deadline = self._chair.role.table.deadline()
            if deadline is not None and deadline > now:
                due.append(deadline)
        return min(due)

    def _send_facts(self, now: float) -> None:
        if self._facts and now >= self._facts_due and self.takes_part:
            self._facts_due = now + self._patience / 5
            facts = dict(self._facts)
            self._facts.clear()
            self._tell("facts", PeerFacts(self.job, self.committed.counter, facts), now)

    def _ask_to_join(self, now: float) -> None:
        """Ask the coordinator for a place, until a generation lists us."""
        if not self._joins or self.takes_part or now < self._join_due:
            if self._needs_place(now):
                self._place(now)
            return
        if self.acceptor.fenced and self.me in self.committed.participants:
            return  # our promise is about a generation that will list us
        self._place(now)

    def _needs_place(self, now: float) -> bool:
        """Whether our worker failed, and it is time to try again."""
        failed = 0 < self._worker_failures < MAX_WORKER_FAILURES
        return (
            failed
            and self._joins
            and not self._held.has_state
            and (now >= self._join_due and self.takes_part)
        )

    def _place(self, now: float) -> None:
        self._join_due = now + self._patience
        target = self._join_hint or self.committed.coordinator
        if target == self.me or self.committed.coordinator == self.me:
            if self._chair is not None:
                self._coordinate(self.me, Join(self.job), now)
            return
        self._outbox.put(target, "join", Join(self.job), now)

    # -- candidate

    def _candidate_tick(self, now: float) -> None:
        ours = self.committed.coordinator == self.me  # restarted, or fenced
        if ours or self._succession.due(self.committed, now):
            participants = self.committed.participants
            self._start_campaign(now, participants)

    def _start_campaign(self, now: float, wanted: tuple[PeerId, ...]) -> None:
        if self._applying(now):
            return
        wish = Wish(
            participants=wanted,
            max_peers=max_participants(self.spec),
            members=self._members,
            avoid_coordinator=self.me not in wanted,
            depose=self.committed.coordinator == self.me,
        )
        promised = self.acceptor.promised
        self._succession.start(self.committed, wish, promised, now)

    def _conclude_campaign(self, now: float) -> None:
        campaign = self._succession.conclude(now)
        if campaign is None:
            return
        if campaign.commit is not None:
            self._won(campaign.commit, electors(campaign.base), now)
        elif campaign.newer is not None:
            self._learn(campaign.newer, now)
        elif campaign.reason == NOBODY and self._worker_failures:
            self._end(Trigger.BROKE, self.reason or self._worker_failure, now)

    def _won(self, commit: Commit, before: frozenset[PeerId], now: float) -> None:
        self._learn(commit, now)
        if self.committed is commit.generation:
            for peer in sorted(before | self._audience()):
                if peer != self.me:
                    self._outbox.put(peer, "commit", commit, now)

    # -- coordinator

    def _missing(self, now: float) -> tuple[PeerId, ...]:
        """Return the lost electors, if those we hear are no majority."""
        group, lost = electors(self.committed), self._liveness.lost(now)
        return () if has_majority(group, group - lost) else tuple(sorted(lost))

    def _coordinate_tick(self, chair: Chair, now: float) -> None:
        role, missing = chair.role, self._missing(now)
        chair.beat(missing, now)
        if missing:
            return
        live = frozenset(self.committed.participants) - self._liveness.lost(now)
        seen = max(self.acceptor.promised, self._succession.highest_seen)
        fenced = seen > self.committed.counter
        why = "a later epoch was promised" if fenced else role.change_wanted(live, now)
        if why:
            lost = () if role.genesis else self._liveness.lost(now)
            wanted = tuple(p for p in role.wanted() if p not in lost)
            self._start_campaign(now, wanted)
        elif self._succession.campaign is None:
            chair.decide(live, now)
        if chair.verdict is not None:
            self._end(*chair.verdict, now)

    # -- the end

    def _end(self, trigger: Trigger, reason: str, now: float) -> None:
        """End the job as its coordinator and tell everybody."""
        state = advance(self.state, trigger)
        tell = self._audience() | (
            self._chair.role.joiners.keys() if self._chair else set()
        )
        self._outbox.clear()
        if reason:
            self.ledger.put(REASON_FACT, reason[:500])
        self._adopt_end(state, reason)
        self._effects.append(Publish())
        for peer in sorted(tell - {self.me}):
            self._outbox.put(peer, "finished", self._finished(), now)

    def _finished(self) -> Finished:
        return Finished(
            self.job, self.committed.counter, END[self.state], self.reason[:500]
        )

    def _on_finished(self, sender: PeerId, finished: Finished) -> JobMessage:
        behind = finished.counter > self.committed.counter
        if not behind and sender != self.committed.coordinator:
            return self.acceptor.refuse("E_STALE", f"{short(sender)} does not decide")
        self._adopt_end(JobState(finished.state), finished.reason)
        return Done()

    def _adopt_end(self, state: JobState, reason: str) -> None:
        if self.over or not is_over(state):
            return
        self.state, self.reason = state, reason
        self._succession.campaign, self._chair = None, None
        self._outbox.clear()
        self._record(state.value, self.me, {"reason": reason} if reason else {})
        self._effects += [Retire(), Ended(state)]

    def _record(
        self,
        kind: str,
        peer: PeerId | None,
        facts: dict[str, str | int | float | bool],
    ) -> None:
        self._effects.append(Recorded(kind, peer, facts))


def names_of(peers: Sequence[PeerId]) -> str:
    """Return the short ids of up to MAX_NAMED ``peers``, joined by commas."""
    return ",".join(short(peer) for peer in peers[:MAX_NAMED])
