r"""What one peer believes of each member, from first-hand words and from hearsay.

              first word                 silence, hearsay            time is over
    unknown ------------> alive ----------------------------> suspect ----------> dead
                            ^------------------------------------+-----------------+
                              its own word: a message, a connection, a signed claim

Hearsay never kills: whatever others say of a member starts a suspicion of our own, in
which it can answer, and we ask it ourselves, again and again. Hearsay never revives
either, but for the member's own signature.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum
from random import Random

from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.losses import Losses
from crdt_store.liveness.messages import MAX_INTRODUCED, Claim, Standing
from crdt_store.liveness.news import News
from crdt_store.liveness.rounds import Rounds
from crdt_store.liveness.suspicions import Suspicions
from fabric.core.ids import PeerId

MAX_JUMP = 2**32
"""A claim further ahead than this is a lie: it would use up all incarnations."""
MAX_HEARD = 256
"""Peers of which we remember when we heard them last."""

Verify = Callable[[PeerId, int, bytes], bool]
"""Whether a member signed that it lives in an incarnation."""


class State(StrEnum):
    """What we believe of a member."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    UNKNOWN = "unknown"


class Beliefs:
    """The members, and what we believe of them.

    Args:
        me: This peer.
        config: Periods.
        rng: Order of probes.
        verify: Checks a member's claim that it lives.

    Attributes:
        rounds: The members and whom to probe next.
        news: Claims to pass on.
        counts: Refused claims, by name.
        hinted: Members to look at soon.
        urgent: A suspicion was answered: others should hear before it ends there.
        losses: Of our calls, which set how often a suspect is asked.
    """

    def __init__(
        self, me: PeerId, config: LivenessConfig, rng: Random, verify: Verify
    ) -> None:
        self.rounds = Rounds(rng)
        self._rng = rng
        self.news = News()
        self.counts: Counter[str] = Counter()
        self.hinted: dict[PeerId, None] = {}
        self.urgent = False
        self.dead: dict[PeerId, int] = {}
        self.losses = Losses()
        self.suspicions = Suspicions(config, self.losses)
        self._me = me
        self._config = config
        self._verify = verify
        self._unknown: set[PeerId] = set()
        self._incarnations: dict[PeerId, int] = {}
        self._heard: dict[PeerId, float] = {}
        self._owed: dict[PeerId, Claim] = {}
        self._changed: set[PeerId] = set()

    # --- what they are

    def state(self, peer: PeerId) -> State:
        """Return what we believe of ``peer``; ourselves are alive."""
        if peer in self.dead:
            return State.DEAD
        if peer in self.suspicions:
            return State.SUSPECT
        known = peer == self._me or (peer in self.rounds and peer not in self._unknown)
        return State.ALIVE if known else State.UNKNOWN

    @property
    def num_members(self) -> int:
        """Members that are not dead, ourselves included."""
        return len(self.rounds.members) + 1 - len(self.dead)

    def heard_at(self, peer: PeerId) -> float | None:
        """Return when ``peer`` itself said something last, if not long ago."""
        return self._heard.get(peer)

    def take_changes(self) -> set[PeerId]:
        """Return and forget whose state changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def take_news(self, peer: PeerId) -> tuple[Claim, ...]:
        """Return claims for ``peer``; what is said of itself always comes first."""
        owed = self._owed.pop(peer, None)
        if owed is not None:
            self.hinted.pop(peer, None)
        about = owed or self.accusation(peer)
        news = self.news.take(self.num_members)
        if about is None:
            return news
        return (about, *(claim for claim in news if claim != about))

    def introduction(self) -> tuple[Claim, ...]:
        """Return who is absent, for a newcomer; all others are there."""
        dead = [Claim(p, i, Standing.DEAD, self._me) for p, i in self.dead.items()]
        if len(dead) > MAX_INTRODUCED:  # others next time
            return tuple(self._rng.sample(dead, MAX_INTRODUCED))
        return tuple(dead)

    def accusation(self, peer: PeerId) -> Claim | None:
        """Return what is held against ``peer``."""
        if peer in self.dead:
            return Claim(peer, self.dead[peer], Standing.DEAD, self._me)
        suspicion = self.suspicions.get(peer)
        if suspicion is None:
            return None
        return Claim(peer, suspicion.incarnation, Standing.SUSPECT, self._me)

    # --- who is a member

    def add(self, peer: PeerId) -> None:
        """``peer`` became a member, of whom nothing is known."""
        self.rounds.add(peer)
        self._unknown.add(peer)
        self._changed.add(peer)

    def forget(self, peer: PeerId) -> None:
        """``peer`` is no member any more."""
        self.rounds.remove(peer)
        self._unknown.discard(peer)
        self.suspicions.lift(peer)
        self.losses.forget(peer)
        self.news.forget(peer)
        for table in (self.dead, self._incarnations, self._heard, self._owed):
            table.pop(peer, None)
        self.hinted.pop(peer, None)
        self._changed.add(peer)

    def assume_alive(self) -> None:
        """Believe of those that nobody called absent that they are there."""
        self._changed |= self._unknown
        self._unknown.clear()

    @property
    def has_unknown(self) -> bool:
        """Whether there are members of whom nobody has said anything yet."""
        return bool(self._unknown)

    def pardon(self, peers: Iterable[PeerId]) -> None:
        """Believe that these dead are there: it was we who were cut off."""
        for peer in list(peers):
            self._revive(peer)

    # --- first hand

    def witness(self, peer: PeerId, incarnation: int | None, now: float) -> None:
        """Take the word of member ``peer`` itself, in ``incarnation`` if it says so."""
        self.losses.heard(peer)
        heard = self._heard
        heard.pop(peer, None)
        heard[peer] = now
        if len(heard) > MAX_HEARD:
            del heard[next(iter(heard))]
        self.hinted.pop(peer, None)
        said = self._incarnations.get(peer, 0)
        if incarnation is not None and said < incarnation <= said + MAX_JUMP:
            self._incarnations[peer] = said = incarnation
        accusation = self.accusation(peer)
        if accusation is not None and accusation.incarnation >= said:
            self._owed[peer] = accusation  # others heard it too: let it refute
            self.hinted[peer] = None
        self._revive(peer)

    def _revive(self, peer: PeerId) -> None:
        absent = peer in self.dead or peer in self.suspicions or peer in self._unknown
        if not absent:
            return
        self.dead.pop(peer, None)
        self.suspicions.lift(peer)
        self._unknown.discard(peer)
        self._changed.add(peer)
        self.news.acquit(peer)

    def unanswered(self, peer: PeerId) -> None:
        """A call of ``peer`` itself brought no answer."""
        if peer in self.rounds and peer not in self.dead:
            self.losses.unanswered(peer)

    def suspect(self, peer: PeerId, now: float) -> None:
        """Nobody we asked reached ``peer``."""
        incarnation = self._incarnations.get(peer, 0)
        self._accuse(Claim(peer, incarnation, Standing.SUSPECT, self._me), now)

    def to_ask(self, now: float, patience: float) -> list[tuple[PeerId, float]]:
        """Return the suspects to ask now, and until when each may answer."""
        return self.suspicions.to_ask(now, self.num_members, patience)

    def bury_due(self, now: float) -> list[PeerId]:
        """Return the suspects whose time is over; they are dead now."""
        over = self.suspicions.due(now, self.num_members)
        for peer in over:
            suspicion = self.suspicions.lift(peer)
            assert suspicion is not None
            self.hinted.pop(peer, None)
            self.losses.forget(peer)
            self.dead[peer] = suspicion.incarnation
            self._changed.add(peer)
            self.news.add(Claim(peer, suspicion.incarnation, Standing.DEAD, self._me))
        return over

    # --- hearsay

    def hear_claim(self, claim: Claim, now: float) -> None:
        """Take a claim about somebody else than ourselves."""
        if self.suspicions.heard_before(claim):
            return
        peer = claim.subject
        known = self._incarnations.get(peer, 0)
        if peer not in self.rounds.members:
            return
        if claim.incarnation < known:
            # It refuted that, as we alone may know: if it died since, so do we alone.
            if claim.standing is Standing.DEAD and not self._met_lately(peer, now):
                self.hinted[peer] = None
            return
        if claim.incarnation > known + MAX_JUMP:
            self.counts["claim_too_far"] += 1
        elif claim.standing is Standing.ALIVE:
            self._hear_life(claim, known)
        elif self._met_lately(peer, now):
            self._owed[peer] = claim  # it told us otherwise just now
        elif peer not in self.dead:
            self._accuse(claim, now)

    def _met_lately(self, peer: PeerId, now: float) -> bool:
        heard = self._heard.get(peer, -math.inf)
        return now - heard < self._config.period_seconds

    def _hear_life(self, claim: Claim, known: int) -> None:
        peer, incarnation = claim.subject, claim.incarnation
        accusation = self.accusation(peer)
        answers = accusation is not None and accusation.incarnation < incarnation
        if incarnation <= known and not answers:
            return
        if not self._verify(peer, incarnation, claim.signature):
            self.counts["bad_signature"] += 1
            return
        self._incarnations[peer] = incarnation
        if accusation is None or answers:
            self._revive(peer)
        self.urgent |= answers
        self.news.add(claim)

    def _accuse(self, claim: Claim, now: float) -> None:
        peer = claim.subject
        if peer not in self.suspicions:
            self._unknown.discard(peer)
            self._changed.add(peer)
        if self.suspicions.accuse(claim, now, self.num_members):
            self.news.add(claim)
