"""A participant's part in the newest generation: obey its coordinator, report upward.

It knows what this peer's runner holds and whether it is applying a decision, and hands
the coordinator's orders to the runner as effects.
"""

from __future__ import annotations

from msgspec.structs import replace

from fabric.core.ids import JobId, PeerId, short
from fabric.jobs.effects import Decide, Effect, Fact, SaveState
from fabric.jobs.ledger import Ledger
from fabric.jobs.membership import Membership
from fabric.jobs.messages import (
    Beat,
    Done,
    Generation,
    JobMessage,
    Nack,
    PeerFacts,
    RoundDecision,
    Save,
    Setting,
    Standing,
    StateHeld,
)
from fabric.jobs.promises import Acceptor, Held
from fabric.jobs.succession import Succession, no_quorum


class Participant:
    """One peer's part.

    Args:
        me: This peer.
        job: The job.
        acceptor: Which generation stands, and whether it still acts here.
        succession: Learns when the coordinator was heard.
        membership: Learns that the coordinator waits for us after a restart.
        ledger: The job's numbers.
        effects: Where the runner's orders go.
        patience: Seconds, the spec's one knob.
        now: Monotonic seconds.
        resumed: This peer restarted in the committed generation and holds nothing.
    """

    def __init__(
        self,
        me: PeerId,
        job: JobId,
        *,
        acceptor: Acceptor,
        succession: Succession,
        membership: Membership,
        ledger: Ledger,
        effects: list[Effect],
        patience: float,
        now: float,
        resumed: bool,
    ) -> None:
        self._me, self._job = me, job
        self._acceptor, self._succession = acceptor, succession
        self._membership, self._ledger = membership, ledger
        self._effects, self._patience = effects, patience
        self.resumed = resumed
        self.presides = False
        self.held = Held()
        self.decided = -1
        self._busy: tuple[int, float] | None = None
        self._facts: dict[str, Fact] = {}
        self._facts_due = now
        self._saving: set[int] = set()
        self.settings: tuple[Setting, ...] = ()

    @property
    def coordinates(self) -> bool:
        """Whether we preside over the newest generation and may act."""
        return self.presides and not self._acceptor.fenced

    @property
    def takes_part(self) -> bool:
        """Whether we are a participant of the newest generation, and it acts."""
        generation = self._acceptor.committed
        mine = self._me in generation.participants and generation.counter > 0
        return mine and not self.resumed and not self._acceptor.fenced

    def applying(self, now: float) -> bool:
        """Whether our runner applies a decision, so what we hold is about to change."""
        return self._busy is not None and now < self._busy[1]

    def enter(self, generation: Generation) -> None:
        """Take part in a generation from its base state on."""
        self._busy = None
        self.resumed, self._saving = False, set()
        if self.decided != generation.base_round - 1:  # else we know what is in force
            self.settings = generation.settings
        self.decided = generation.base_round - 1
        if generation.base_round < self.held.round:
            self.held = Held()  # rolled back: our runner fetches the older state

    def drop(self) -> None:
        """Our runner is gone, and with it what it held."""
        self.held, self._busy = Held(), None

    # -- what the runner says

    def on_held(self, event: StateHeld) -> StateHeld | None:
        """Note which state our runner holds; return what to tell the coordinator."""
        generation = self._acceptor.committed
        base = (generation.base_round, generation.state_digest)
        state = (event.round, event.state_digest)
        if event.counter < generation.counter and state != base:
            return None  # of a generation that was rolled back meanwhile
        self.held = Held(event.round, event.state_digest, has_state=True)
        if self._busy is not None and event.round >= self._busy[0]:
            self._busy = None
        if not self.takes_part:
            return None
        return replace(event, counter=generation.counter)

    def base_held(self) -> StateHeld | None:
        """Return what to tell the coordinator if we hold the base state already."""
        generation, held = self._acceptor.committed, self.held
        base = (generation.base_round, generation.state_digest)
        if not held.has_state or base != (held.round, held.digest):
            return None
        return StateHeld(self._job, generation.counter, held.round, held.digest)

    def add_facts(self, facts: dict[str, Fact], now: float) -> None:
        """Keep numbers for the next report of facts."""
        self._facts.update(facts)
        self._facts_due = min(self._facts_due, now + self._patience / 5)

    def due_facts(self, now: float) -> PeerFacts | None:
        """Return the facts to send now, if it is time to."""
        if not self._facts or now < self._facts_due or not self.takes_part:
            return None
        self._facts_due = now + self._patience / 5
        facts = dict(self._facts)
        self._facts.clear()
        return PeerFacts(self._job, self._acceptor.committed.counter, facts)

    def saved(self, round_number: int) -> None:
        """Our runner wrote the checkpoint of that round, or failed to."""
        self._saving.discard(round_number)

    # -- what the coordinator says

    def standing(self, counter: int, now: float) -> Standing:
        """Return where we stand, with our commit if newer than ``counter``."""
        commit = self._acceptor.commit()
        newer = commit.generation.counter > counter
        return Standing(
            job=self._job,
            promised=self._acceptor.promised,
            held_round=self.held.round,
            held_digest=self.held.digest,
            has_state=self.held.has_state,
            follows=self._follows(now),
            busy=self.applying(now),
            committed=commit.generation if newer else None,
            proof=commit.acks if newer else (),
        )

    def _follows(self, now: float) -> bool:
        if self._acceptor.committed.coordinator == self._me:
            return self.coordinates
        return now - self._succession.heard < 0.8 * self._patience

    def _refusal(self, sender: PeerId, counter: int, now: float) -> Nack | None:
        """Return a refusal unless ``sender`` may command under epoch ``counter``."""
        acceptor, generation = self._acceptor, self._acceptor.committed
        if counter > generation.counter:
            return acceptor.refuse("E_NOT_YET", f"epoch {counter} is unknown here")
        if counter < generation.counter or sender != generation.coordinator:
            reason = f"epoch {counter} of {short(sender)} is over"
            return acceptor.refuse("E_STALE", reason)
        self._succession.heard = now
        if acceptor.fenced:
            return acceptor.refuse("E_FENCED", f"promised epoch {acceptor.promised}")
        return None

    def on_beat(self, sender: PeerId, beat: Beat, now: float) -> JobMessage:
        """The coordinator lives: answer where we stand."""
        refusal = self._refusal(sender, beat.counter, now)
        if refusal is not None and refusal.code == "E_STALE":
            return refusal
        self._ledger.adopt(beat.facts)
        self._succession.blocked = no_quorum(beat.missing) if beat.missing else None
        if self.resumed:
            self._membership.hurry(now)
        return self.standing(beat.counter, now)

    def on_decision(
        self, sender: PeerId, decision: RoundDecision, now: float
    ) -> JobMessage:
        """Have our runner apply a decision, once."""
        refusal = self._refusal(sender, decision.counter, now)
        if refusal is not None:
            return refusal
        if not self.takes_part or decision.round <= self.decided:
            return Done()
        self.decided = decision.round
        self.settings = decision.settings
        self._busy = (decision.round + 1, now + self._patience)
        self._ledger.decided(decision)
        self._effects.append(Decide(decision))
        return Done()

    def on_save(self, sender: PeerId, save: Save) -> JobMessage:
        """Have our runner write the state of a round as a checkpoint, once."""
        generation = self._acceptor.committed
        acts = sender == generation.coordinator and self.takes_part
        if not acts or save.counter != generation.counter:
            return self._acceptor.refuse("E_STALE", f"epoch {save.counter} is over")
        if save.round not in self._saving:
            self._saving.add(save.round)
            self._effects.append(SaveState(save.round))
        return Done()
