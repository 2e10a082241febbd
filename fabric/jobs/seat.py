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

from collections.abc import Iterable

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId, PeerId, short
from fabric.core.signing import Signer, seal
from fabric.jobs.effects import (
    Outputs,
    Persist,
    Retire,
)
from fabric.jobs.ledger import Ledger
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
    Setting,
    Standing,
    StateHeld,
)
from fabric.jobs.promises import Held, PromiseRecord
from fabric.jobs.runner import (
    RunnerEvent,
    RunnerFailed,
    RunnerProgress,
    RunnerResult,
)
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import JobState, JobStatus, Pause, Trigger, is_over
from fabric.jobs.tenure import REASON_FACT, Tenure

RETRY = ("E_NOT_YET", "E_BUSY", "E_UNKNOWN_JOB")
"""Refusals that end by themselves: the receiver is about to learn what it lacks."""


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
        self._patience = spec.fault.patience_seconds
        self._tenure = Tenure(self.me, job, spec, record=record, now=now, seed=seed)
        self.restoration = self._tenure.restoration

    # -- what others may read

    @property
    def committed(self) -> Generation:
        """Newest generation we know to be committed."""
        return self._tenure.committed

    @property
    def ledger(self) -> Ledger:
        """The job's numbers as we know them."""
        return self._tenure.ledger

    @property
    def state(self) -> JobState:
        """Where the job is in its life."""
        return self._tenure.outcome.state

    @property
    def reason(self) -> str:
        """Why the job ended, or why we no longer take part in it."""
        given_up = (
            self._tenure.membership.failure if self._tenure.membership.gave_up else ""
        )
        return self._tenure.outcome.reason or given_up

    @property
    def resumed(self) -> bool:
        """Whether this peer restarted in the committed generation and holds nothing."""
        return self._tenure.part.resumed

    @property
    def holds_state(self) -> bool:
        """Whether our worker takes part and holds a state."""
        return self._tenure.part.takes_part and self._tenure.part.held.has_state

    @property
    def coordinates(self) -> bool:
        """Whether we coordinate the newest generation and may act."""
        return self._tenure.part.coordinates

    @property
    def over(self) -> bool:
        """Whether the job ended."""
        return self._tenure.outcome.over

    @property
    def idle(self) -> bool:
        """Whether the job ended and everybody who should know was told."""
        return self.over and self._tenure.outbox.empty

    @property
    def next_round(self) -> int:
        """The round after the newest that we know to be decided."""
        return self._tenure.part.decided + 1

    def pause(self, now: float) -> Pause | None:
        """Return why nothing happens, or less than could, or None."""
        if self.over:
            return None
        pause = (
            self._tenure.chair.pause(now) if self._tenure.chair is not None else None
        )
        return pause or self._tenure.succession.blocked

    # -- orders from our own daemon

    def set_members(self, members: Iterable[PeerId]) -> None:
        """Say who is in the mesh: candidates for a witness."""
        self._tenure.members = frozenset(members)

    def set_joining(self, joins: bool, hint: PeerId | None, now: float) -> None:
        """Say whether we want to take part, and whom to ask if we know better."""
        self._tenure.membership.wish(joins, hint, now)

    def set_settings(self, settings: tuple[Setting, ...]) -> None:
        """Say what people set on the board: an input of the next decision we take."""
        self._tenure.settings = settings

    def leave(self, now: float, *, failed: bool = False, reason: str = "") -> None:
        """Ask to be left out; at once when our worker ``failed``."""
        if not failed:
            self._tenure.membership.leave()
        if self.me in self.committed.participants:
            self._tenure.tell("leave", Leave(self.job, failed, reason[:500]), now)

    def stop(self, now: float) -> bool:
        """Cancel the job; False when only the coordinator can."""
        if not self.coordinates:
            return self.over
        self._tenure.end(Trigger.STOPPED, "stopped by a member", now)
        return True

    def learn_status(self, status: JobStatus) -> None:
        """Follow a replicated status that says the job ended."""
        if is_over(status.state) and not self.over:
            self._tenure.ledger.adopt(status.facts)
            self._tenure.adopt_end(status.state, str(status.facts.get(REASON_FACT, "")))

    def saved(self, at: int, root: str, reason: str, now: float) -> None:
        """Our runner wrote checkpoint ``root`` of round ``at``; empty: it failed to."""
        self._tenure.part.saved(at)
        saved = Saved(self.job, self.committed.counter, at, root, reason[:500])
        self._tenure.tell(f"saved {at}", saved, now)

    # -- events of our runner

    def event(self, event: RunnerEvent, now: float, hot: Held | None = None) -> None:
        """Take a fact from our runner; ``hot`` is what a new worker here could hold."""
        match event:
            case RoundReport():
                if event.counter == self.committed.counter:
                    self._tenure.tell("report", event, now)
            case StateHeld():
                if (held := self._tenure.part.on_held(event)) is not None:
                    self._tenure.tell("held", held, now)
            case RunnerProgress() | RunnerResult():
                self._tenure.part.add_facts(event.facts, now)
            case RunnerFailed():
                self._on_worker_failed(f"{event.code}: {event.reason}"[:500], now, hot)

    def _on_worker_failed(self, reason: str, now: float, hot: Held | None) -> None:
        tenure = self._tenure
        tenure.part.drop()
        tenure.record("worker_failed", self.me, {"reason": reason})
        tenure.effects.append(Retire())
        tenure.membership.worker_failed(reason, now)
        self.recalled(hot)
        mine = self.me in self.committed.participants
        if mine and tenure.part.held.has_state and tenure.membership.may_rejoin:
            # The next worker starts from what is kept: nothing to wait for.
            tenure.tell("join", Join(self.job), now)
        else:
            self.leave(now, failed=True, reason=reason)

    def recalled(self, hot: Held | None) -> None:
        """A state is kept outside the workers: a new worker of ours could hold it."""
        part = self._tenure.part
        if hot is None or part.held.has_state:
            return
        if hot.round >= self.committed.base_round:
            part.held = hot

    # -- messages

    def receive(self, sender: PeerId, message: JobMessage, now: float) -> JobMessage:
        """Return the answer to ``message``; send it after the effects of a poll."""
        self._tenure.liveness.heard(sender, now)
        if self.over and not isinstance(message, Finished | Done):
            return self._tenure.finished(now)
        match message:
            case Propose():
                return self._on_propose(message, now)
            case Commit():
                self._tenure.learn(message, now)
                return Done()
            case Inquire():
                return self._tenure.part.standing(message.counter, now)
            case Beat() | RoundDecision() | Save() | Finished():
                return self._obey(sender, message, now)
            case RoundReport() | StateHeld() | PeerFacts() | Saved() | Join() | Leave():
                return self._tenure.coordinate(sender, message, now)
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
                return self._tenure.part.on_beat(sender, message, now)
            case RoundDecision():
                return self._tenure.part.on_decision(sender, message, now)
            case Save():
                return self._tenure.part.on_save(sender, message)
            case Finished():
                return self._on_finished(sender, message)

    def _on_propose(self, propose: Propose, now: float) -> JobMessage:
        refusal = self._tenure.refusal(propose.generation, now)
        if refusal is not None:
            return refusal
        answer, record = self._tenure.acceptor.on_propose(
            propose, self._tenure.part.held
        )
        if record is not None:
            self._tenure.effects.append(Persist(record))
        if isinstance(answer, AckBody):
            return Ack(seal(self._signer, KIND_ACK, ACK_BODY.encode(answer)))
        return answer

    # -- answers to what we sent

    def replied(
        self, peer: PeerId, request: JobMessage, reply: JobMessage, now: float
    ) -> None:
        """``peer`` answered ``request``."""
        self._tenure.liveness.heard(peer, now)
        if isinstance(reply, Standing | Nack):
            self._tenure.note_promise(peer, reply)
        elif isinstance(reply, Finished):
            self._tenure.follow_end(reply)
        if isinstance(request, Inquire | Propose):
            self._tenure.succession.replied(peer, request, reply, now)
            return
        retry = isinstance(reply, Nack) and reply.code in RETRY
        if retry:
            self._tenure.outbox.failed(peer, request, now)
        else:
            self._tenure.outbox.answered(peer, request)
        if isinstance(reply, Nack | Standing) and reply.committed is not None:
            self._tenure.learn(Commit(reply.committed, reply.proof), now)
        if isinstance(reply, Nack) and not retry:
            self._refused(peer, request, now)

    def _refused(self, peer: PeerId, request: JobMessage, now: float) -> None:
        """``peer`` refused ``request`` for good."""
        if isinstance(request, Save):
            self._tenure.save_refused(peer, request)
        elif isinstance(request, Join):
            self._tenure.membership.refused(peer, now)

    def connection_broke(self, peer: PeerId, now: float) -> None:
        """The connection with ``peer`` broke: look at once whether it still lives."""
        chair = self._tenure.chair
        if self._tenure.liveness.broke(peer, now) and chair is not None:
            chair.beat(chair.missing(now), now, to=peer)

    def failed(
        self,
        peer: PeerId,
        request: JobMessage,
        now: float,
        refused_from: float | None = None,
    ) -> None:
        """``request`` did not reach ``peer``, or no answer came.

        ``refused_from`` is when the call started, if it was refused at once.
        """
        refused = self._tenure.liveness.failed(peer, refused_from)
        if isinstance(request, Inquire | Propose):
            self._tenure.succession.replied(peer, request, None, now)
        elif (
            isinstance(request, Commit | Finished)
            and peer not in self._tenure.audience()
        ):
            self._tenure.outbox.answered(
                peer, request
            )  # it left; it will ask when it is back
        else:
            self._tenure.outbox.failed(peer, request, now, soon=refused)

    # -- time

    def poll(self, now: float) -> Outputs:
        """Do what is due and return everything to perform and to send."""
        sends: list[tuple[PeerId, JobMessage]] = []
        if not self.over:
            self._tenure.tick(now)
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
                self._tenure.conclude_campaign(now)
        effects = tuple(self._tenure.effects)
        self._tenure.effects.clear()  # shared with the chair: never another list
        return Outputs(effects, tuple(sends))

    def _outgoing(self, now: float) -> list[tuple[PeerId, JobMessage]]:
        campaign = self._tenure.succession.campaign if not self.over else None
        return [
            *self._tenure.outbox.take(now),
            *(campaign.outgoing() if campaign else ()),
        ]

    def next_timeout(self, now: float) -> float:
        """Return when :meth:`poll` is due at the latest."""
        due = [now + self._patience / 4]
        if (outgoing := self._tenure.outbox.next_timeout()) is not None:
            due.append(outgoing)
        if (campaign := self._tenure.succession.campaign) is not None:
            due.append(campaign.deadline)
        if self._tenure.chair is not None:
            deadline = self._tenure.chair.role.table.deadline()
            if deadline is not None and deadline > now:
                due.append(deadline)
        return min(due)

    def _on_finished(self, sender: PeerId, finished: Finished) -> JobMessage:
        behind = finished.counter > self.committed.counter
        if not behind and sender != self.committed.coordinator:
            return self._tenure.acceptor.refuse(
                "E_STALE", f"{short(sender)} does not decide"
            )
        self._tenure.follow_end(finished)
        return Done()
