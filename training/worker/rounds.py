"""Which round this worker is in, and what it waits for. Pure: no tensors, no sockets.

    idle --hold(state)--> training --own_ready--> waiting --decided and all held--> step
             ^                |                                                      |
             |                +--decided without us: our work is given up------------+
             +--------------------------hold(next state)-----------------------------+

A change of generation in the middle of a round keeps what was computed and received:
the own contribution is sent again to newcomers, never computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from fabric.core.errors import LocalProtocolError
from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import (
    Generation,
    RoundDecision,
    RoundReport,
    Setting,
    StateHeld,
)

LOOKAHEAD_ROUNDS = 2
"""Rounds of contributions kept beyond our own while we catch up."""

Payload = bytearray


@dataclass(frozen=True)
class Piece:
    """One contributor's whole pseudo-gradient of one round."""

    tokens: int
    payload: Payload
    name: str
    """Hex BLAKE3 of the payload."""


@dataclass(frozen=True)
class StepReady:
    """Everything a decided outer step needs, in PeerId order."""

    contributors: tuple[PeerId, ...]
    payloads: tuple[Payload, ...]
    tokens: tuple[int, ...]
    settings: tuple[Setting, ...] = ()


@dataclass
class Rounds:
    """The worker's place in the run; fed by one thread.

    Args:
        job: The job.
        me: This peer.
        num_rounds: Rounds of the whole run; a decision may end it earlier.
    """

    job: JobId
    me: PeerId
    num_rounds: int
    generation: Generation | None = None
    held: StateHeld | None = None
    own: Piece | None = None
    own_loss: float = 0.0
    _pieces: dict[tuple[int, PeerId], Piece] = field(default_factory=dict)
    _vouched: dict[tuple[int, PeerId], int] = field(default_factory=dict)
    _decisions: dict[int, RoundDecision] = field(default_factory=dict)
    _broken: set[PeerId] = field(default_factory=set)

    @property
    def round(self) -> int:
        """The round whose start state is held; the generation's while none is."""
        if self.held is not None:
            return self.held.round
        return self.generation.base_round if self.generation else 0

    @property
    def others(self) -> frozenset[PeerId]:
        """The generation's other participants."""
        members = self.generation.participants if self.generation else ()
        return frozenset(members) - {self.me}

    @property
    def takes_part(self) -> bool:
        """Whether this peer is a participant of the current generation."""
        return self.generation is not None and self.me in self.generation.participants

    @property
    def over(self) -> bool:
        """Whether the state that the last round ends with is held."""
        return self.held is not None and self.held.round >= self.num_rounds

    def apply(self, generation: Generation) -> bool:
        """Enter ``generation``; return False when it is not newer than the current one.

        The held state stays when the generation starts from it; otherwise it is
        dropped, with all work on it, and :meth:`missing_state` names what to get.
        """
        if self.generation and generation.counter <= self.generation.counter:
            return False
        self.generation = generation
        self._broken &= self.others
        if self.held is not None:
            if self._starts_from(generation, self.held):
                self.held = msgspec.structs.replace(
                    self.held, counter=generation.counter
                )
            else:
                self.held = None
                self.own = None
        # What an earlier epoch decided is for its own participants.
        self._decisions.clear()
        self._prune()
        return True

    def missing_state(self) -> Generation | None:
        """Return the generation whose start state is still to be got, or None."""
        if self.takes_part and self.held is None:
            return self.generation
        return None

    def hold(self, round_number: int, digest: str) -> StateHeld:
        """Record that the start state of ``round_number`` is here; return the fact."""
        if self.generation is None:
            raise LocalProtocolError("a state before any generation")
        self.held = StateHeld(self.job, self.generation.counter, round_number, digest)
        self.own = None
        self._prune()
        return self.held

    @property
    def wants_training(self) -> bool:
        """Whether inner steps of the current round are still of use."""
        if not self.takes_part or self.held is None or self.over:
            return False
        decision = self._decisions.get(self.held.round)
        return self.own is None and decision is None

    def own_ready(self, piece: Piece, loss: float) -> None:
        """Record our own contribution to the current round."""
        if not self.wants_training:
            raise LocalProtocolError("a contribution nobody waits for")
        self.own = piece
        self.own_loss = loss

    def received(
        self, peer: PeerId, counter: int, round_number: int, piece: Piece
    ) -> bool:
        """Record another's contribution, sent under epoch ``counter``.

        One of a later epoch replaces an earlier one: its author's worker was started
        again and computed another.
        """
        key = (round_number, peer)
        if peer not in self.others or not self._within_reach(round_number):
            return False
        if counter <= self._vouched.get(key, -1):
            return False
        self._pieces[key] = piece
        self._vouched[key] = counter
        return True

    def vouched(self, peer: PeerId, counter: int, round_number: int, name: str) -> None:
        """``peer`` says under a later epoch that its contribution stands."""
        key = (round_number, peer)
        if key in self._pieces and self._pieces[key].name == name:
            self._vouched[key] = max(counter, self._vouched[key])

    def decide(self, decision: RoundDecision) -> bool:
        """Record the coordinator's choice; return False when it is stale."""
        if self.generation is None or decision.counter != self.generation.counter:
            return False
        if not self._within_reach(decision.round):
            return False
        if len(decision.contributors) != len(decision.tokens) or not sum(
            decision.tokens
        ):
            return False
        self._decisions.setdefault(decision.round, decision)
        if decision.last:
            self.num_rounds = decision.round + 1
        return True

    def step_ready(self) -> StepReady | None:
        """Return the decided outer step once every contribution to it is here."""
        decision = self._decisions.get(self.round)
        if decision is None or self.held is None:
            return None
        order = sorted(zip(decision.contributors, decision.tokens, strict=True))
        pieces = [self._piece(peer) for peer, _ in order]
        found = [piece for piece in pieces if piece is not None]
        if len(found) != len(order):
            return None
        return StepReady(
            tuple(peer for peer, _ in order),
            tuple(piece.payload for piece in found),
            tuple(tokens for _, tokens in order),
            decision.settings,
        )

    def connection_lost(self, peer: PeerId) -> None:
        """A connection with ``peer`` failed or could not be opened."""
        if peer in self.others:
            self._broken.add(peer)

    def connection_restored(self, peer: PeerId) -> None:
        """Both connections with ``peer`` stand."""
        self._broken.discard(peer)

    def report(self) -> RoundReport | None:
        """Return what the coordinator needs to know now; None outside a generation."""
        if self.generation is None or not self.takes_part:
            return None
        holds = [p for p in self.others if self._piece(p) is not None]
        if self.own is not None:
            holds.append(self.me)
        return RoundReport(
            self.job,
            self.generation.counter,
            self.round,
            tuple(sorted(holds)),
            tokens=self.own.tokens if self.own else 0,
            loss=self.own_loss if self.own else 0.0,
            broken=tuple(sorted(self._broken)),
        )

    def _starts_from(self, generation: Generation, held: StateHeld) -> bool:
        return (held.round, held.state_digest) == (
            generation.base_round,
            generation.state_digest,
        )

    def _within_reach(self, round_number: int) -> bool:
        return 0 <= round_number - self.round <= LOOKAHEAD_ROUNDS

    def _piece(self, peer: PeerId) -> Piece | None:
        if peer == self.me:
            return self.own
        key = (self.round, peer)
        return self._pieces.get(key) if self._stands(key) else None

    def _stands(self, key: tuple[int, PeerId]) -> bool:
        # Two survivors could otherwise average different work of one author: what it
        # sent before its worker died, and what it sent after.
        counter = self.generation.counter if self.generation else 0
        return self._vouched.get(key, -1) >= counter

    def _prune(self) -> None:
        for key in [key for key in self._pieces if not self._within_reach(key[0])]:
            del self._pieces[key], self._vouched[key]
        for number in [n for n in self._decisions if not self._within_reach(n)]:
            del self._decisions[number]
