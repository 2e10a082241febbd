"""One attempt to put a new generation in place of the last committed one.

    inquiring --all answered, or half the window--> proposing --> won
        |                                             |  ^-- re-propose, higher counter
        +--> lost (no majority, coordinator lives) <--+

Inquiring binds nobody, so a minority never makes promises that would lock it out of the
generation it belongs to. The proposal's content comes from the answers, and the acks
must confirm it: a peer that acked no longer acts in an older epoch, so what its ack
says it holds is final. When the acks tell another story (a decision arrived meanwhile),
or a listed participant does not ack, it proposes again with a higher counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import msgspec

from fabric.core.digest import rendezvous_order
from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import PeerId
from fabric.core.signing import Signed, open_signed
from fabric.jobs.messages import (
    ACK_BODY,
    KIND_ACK,
    Ack,
    AckBody,
    Commit,
    Generation,
    Inquire,
    JobMessage,
    Nack,
    Propose,
    Settings,
    Standing,
    generation_hash,
)
from fabric.jobs.promises import Held
from fabric.jobs.quorum import Tally, electors, has_majority

BUSY = "a participant applies a decision"
FOLLOWED = "the coordinator lives"
NOBODY = "nobody can take part"
STATE_LOST = "nobody holds a state, and there is a checkpoint"
CHECKPOINT_ELSEWHERE = "nobody holds a state, and another peer knows of a checkpoint"
E_STATE_LOST = "E_STATE_LOST"
"""Refusal of a first round by a peer that knows of a checkpoint; the proposer will
too, as soon as it is in touch with it."""

MAX_ATTEMPTS = 4
"""Proposals of one campaign; then it backs off and inquires afresh."""


class Phase(Enum):
    """Where a campaign is."""

    INQUIRING = "inquiring"
    PROPOSING = "proposing"
    WON = "won"
    LOST = "lost"


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the proposer wants of the new generation.

    Attributes:
        participants: Wanted, in order of preference; silent ones are left out.
        max_peers: Bound on participants.
        members: Candidates for the witness of two.
        avoid_coordinator: Do not name the proposer (its worker failed, it leaves).
        depose: Go on although the present coordinator may live (it is us).
        settings: In force, as far as the proposer knows.
        first_round: The round that the initial state starts.
        checkpoint: The round of the newest checkpoint: nobody starts from the initial
            state instead.
    """

    participants: tuple[PeerId, ...]
    max_peers: int
    members: frozenset[PeerId] = frozenset()
    avoid_coordinator: bool = False
    depose: bool = False
    settings: Settings = ()
    first_round: int = 0
    checkpoint: int = 0


def choose_base(
    holdings: Mapping[PeerId, Held], first: int = 0
) -> tuple[int, str, tuple[PeerId, ...]]:
    """Return (round, digest, sources) of the state a new generation starts from.

    The highest held round; among its digests the one most hold, ties to the higher
    digest. Round ``first`` is the initial state, which everyone derives: no sources.
    """
    top = max((h.round for h in holdings.values() if h.has_state), default=first)
    if top <= first:
        return first, "", ()
    votes: dict[str, list[PeerId]] = {}
    for peer, held in holdings.items():
        if held.has_state and held.round == top:
            votes.setdefault(held.digest, []).append(peer)
    digest = max(votes, key=lambda d: (len(votes[d]), d))
    return top, digest, tuple(sorted(votes[digest]))


def open_ack(envelope: Signed, generation: Generation) -> tuple[PeerId, AckBody]:
    """Return (signer, body) of an ack of ``generation``.

    Raises:
        IntegrityError: the signature does not match, or it acks something else.
        RemoteProtocolError: the payload is malformed.
    """
    signer, payload = open_signed(envelope, KIND_ACK)
    body = ACK_BODY.decode_untrusted(payload)
    named = (body.job, body.counter, body.generation)
    if named != (generation.job, generation.counter, generation_hash(generation)):
        raise IntegrityError(f"ack of {signer} is for epoch {body.counter}")
    return signer, body


def check_commit(commit: Commit, known: Generation) -> None:
    """Accept ``commit`` as proven, given the newest generation we know.

    Raises:
        IntegrityError: an ack is forged, a participant's is missing, or there is no
            majority of ``known`` although the commit follows it.
        RemoteProtocolError: an ack is malformed.
    """
    generation = commit.generation
    if generation.counter == 0:
        return  # implied by the spec: needs no acks
    signers = {open_ack(envelope, generation)[0] for envelope in commit.acks}
    if lacking := set(generation.participants) - signers:
        raise IntegrityError(f"epoch {generation.counter} lacks acks of {len(lacking)}")
    follows = generation.previous == generation_hash(known)
    if follows and not has_majority(electors(known), signers):
        raise IntegrityError(f"epoch {generation.counter} has no majority")


class Campaign:
    """Drive one attempt; feed it answers, send what it lists.

    Args:
        base: Newest committed generation we know.
        me: The proposer.
        wish: What we want.
        promised: Our own highest promise: the counter starts above it.
        now: Monotonic seconds.
        window: Seconds to wait for answers in each phase.
    """

    def __init__(
        self,
        base: Generation,
        me: PeerId,
        wish: Wish,
        *,
        promised: int,
        now: float,
        window: float,
    ) -> None:
        self.base, self.me, self.wish = base, me, wish
        self.phase = Phase.INQUIRING
        self.reason = ""
        self.missing: tuple[PeerId, ...] = ()
        self.commit: Commit | None = None
        self.newer: Commit | None = None
        self.highest = max(promised, base.counter)
        self._window = window
        self._deadline = now + window
        self._asked: set[PeerId] = set()
        self._standings: dict[PeerId, Standing] = {}
        self._silent: set[PeerId] = set()
        self._tally = Tally(electors(base), base.counter)
        self._proofs: dict[PeerId, Signed] = {}
        self._target: Generation | None = None
        self._attempts = 0

    @property
    def over(self) -> bool:
        """Whether it is won or lost."""
        return self.phase in (Phase.WON, Phase.LOST)

    @property
    def deadline(self) -> float:
        """When :meth:`on_timeout` is due."""
        return self._deadline

    @property
    def target(self) -> Generation | None:
        """The generation proposed now."""
        return self._target

    def _wanted(self) -> set[PeerId]:
        wanted = set(electors(self.base)) | set(self.wish.participants)
        if self.phase is Phase.PROPOSING and self._target is not None:
            wanted = set(self._target.participants)
            for group in self._tally.required():
                wanted |= group
        return wanted

    def outgoing(self) -> list[tuple[PeerId, JobMessage]]:
        """Return (peer, message) to send now, ourselves included; each once."""
        peers = sorted(self._wanted() - self._asked)
        self._asked.update(peers)
        if self.phase is Phase.INQUIRING:
            inquiry = Inquire(self.base.job, self.base.counter)
            return [(peer, inquiry) for peer in peers]
        if self.phase is Phase.PROPOSING and self._target is not None:
            propose = Propose(self._target, self.base.counter)
            return [(peer, propose) for peer in peers]
        return []

    # -- inquiring

    def on_standing(self, peer: PeerId, standing: Standing, now: float) -> None:
        """``peer`` answered the inquiry."""
        self.highest = max(self.highest, standing.promised)
        newer = standing.committed
        if newer is not None and newer.counter > self.base.counter:
            self._superseded(Commit(newer, standing.proof))
            return
        if self.phase is not Phase.INQUIRING:
            return
        self._standings[peer] = standing
        if self._answered() >= self._wanted():
            self._propose(now)

    def on_silence(self, peer: PeerId, now: float) -> None:
        """``peer`` could not be reached, or does not know the job."""
        self._silent.add(peer)
        if self.phase is Phase.INQUIRING and self._answered() >= self._wanted():
            self._propose(now)
        elif self.phase is Phase.PROPOSING:
            self._settle(now)

    def _answered(self) -> set[PeerId]:
        return self._standings.keys() | self._silent

    def _followed(self) -> bool:
        """Whether a majority hears a coordinator that is not us."""
        if self.wish.depose:
            return False
        following = {p for p, s in self._standings.items() if s.follows}
        lives = self.base.coordinator in following
        return lives or has_majority(electors(self.base), following)

    # -- proposing

    def _propose(self, now: float) -> None:
        group = electors(self.base)
        if not has_majority(group, self._standings):
            self._lose("no majority", tuple(sorted(group - self._standings.keys())))
        elif self._followed():
            self._lose(FOLLOWED)
        elif any(s.busy for s in self._standings.values()):
            self._lose(BUSY)
        else:
            held = {
                peer: Held(s.held_round, s.held_digest, s.has_state)
                for peer, s in self._standings.items()
            }
            self._start(held, now)

    def _start(self, held: Mapping[PeerId, Held], now: float) -> None:
        """Propose a generation of those wanted peers that ``held`` lists."""
        wanted = [p for p in self.wish.participants if p in held]
        participants = tuple(sorted(wanted[: self.wish.max_peers]))
        self._attempts += 1
        if not participants or self._attempts > MAX_ATTEMPTS:
            self._lose("contention" if participants else NOBODY)
            return
        base_round, digest, sources = choose_base(
            {p: held[p] for p in participants}, self.wish.first_round
        )
        if not digest and self.wish.checkpoint > base_round:
            self._lose(STATE_LOST)
            return
        self.highest += 1
        self._target = Generation(
            job=self.base.job,
            counter=self.highest,
            coordinator=self._coordinator(participants),
            participants=participants,
            base_round=base_round,
            state_digest=digest,
            sources=sources,
            previous=generation_hash(self.base),
            witness=self._witness(participants),
            settings=self.wish.settings,
        )
        self.phase = Phase.PROPOSING
        self._deadline = now + self._window
        self._asked, self._silent, self._proofs = set(), set(), {}
        self._tally = Tally(electors(self.base), self.base.counter)

    def _coordinator(self, participants: tuple[PeerId, ...]) -> PeerId:
        if self.me in participants and not self.wish.avoid_coordinator:
            return self.me
        key = (self.base.job + generation_hash(self.base)).encode()
        others = [p for p in participants if p != self.me] or list(participants)
        return PeerId(rendezvous_order(key, others)[0])

    def _witness(self, participants: tuple[PeerId, ...]) -> str:
        """Return a third voter for a generation of two, which else cannot lose one."""
        others = sorted(self.wish.members - set(participants))
        if len(participants) != 2 or not others:
            return ""
        return rendezvous_order(self.base.job.encode(), others)[0]

    def on_ack(self, peer: PeerId, ack: Ack, now: float) -> None:
        """``peer`` promised; acks of earlier proposals and forged ones are ignored."""
        if self.phase is not Phase.PROPOSING or self._target is None:
            return
        try:
            signer, body = open_ack(ack.envelope, self._target)
        except (IntegrityError, RemoteProtocolError):
            return
        if signer != peer:
            return
        self._tally.add(peer, body)
        self._proofs[peer] = ack.envelope
        self._settle(now)

    def on_nack(self, peer: PeerId, nack: Nack, now: float) -> None:
        """``peer`` refused: it promised more, or knows a later commit."""
        self.highest = max(self.highest, nack.promised)
        if nack.committed is not None and nack.committed.counter > self.base.counter:
            self._superseded(Commit(nack.committed, nack.proof))
        elif nack.code == "E_BUSY":
            self._lose(BUSY)
        elif nack.code == E_STATE_LOST:
            self._lose(CHECKPOINT_ELSEWHERE)
        else:
            self.on_silence(peer, now)

    def _settle(self, now: float, *, late: bool = False) -> None:
        """Commit, propose again, or wait for more answers."""
        target = self._target
        assert target is not None
        acked = self._tally.acks.keys()
        everyone = set(target.participants) <= acked
        waiting = self._wanted() - acked - self._silent
        if self._tally.won and everyone:
            held = {
                peer: Held(b.held_round, b.held_digest, b.has_state)
                for peer, b in self._tally.acks.items()
            }
            holding = {p: held[p] for p in target.participants}
            chosen = choose_base(holding, self.wish.first_round)
            if chosen == (target.base_round, target.state_digest, target.sources):
                self._win(target)
            else:
                self._start(held, now)
        elif late or not waiting:
            self._retry(now)

    def _retry(self, now: float) -> None:
        """Not everyone acked: go on without the silent, if a majority remains."""
        if not self._tally.won:
            missing = self._tally.missing()
            self._lose("no majority" if self._silent else "no answer", missing)
            return
        held = {
            peer: Held(b.held_round, b.held_digest, b.has_state)
            for peer, b in self._tally.acks.items()
        }
        self._start(held, now)

    def _win(self, target: Generation) -> None:
        self.phase = Phase.WON
        acks = tuple(self._proofs[peer] for peer in sorted(self._proofs))
        self.commit = Commit(target, acks)

    def _lose(self, reason: str, missing: tuple[PeerId, ...] = ()) -> None:
        self.phase, self.reason, self.missing = Phase.LOST, reason, missing

    def _superseded(self, commit: Commit) -> None:
        self.newer = commit
        self._lose("a later generation stands")

    def on_timeout(self, now: float) -> None:
        """The window closed: decide with the answers at hand."""
        if self.over:
            return
        if self.phase is Phase.INQUIRING:
            self._propose(now)
        else:
            self._settle(now, late=True)
