r"""Suspects, how long each may still answer, and when we ask it ourselves.

    first heard      gap       gap             gap
    since --------> ask ----> ask --> ... ---------> dead, if its time is over
                     \_________/ it may answer this one until the next begins

All n calls take place within the shortest suspicion, S_min / (n + 1) apart, so asking
oftener keeps no ghost longer. The first comes after one gap: until then the news of an
answer to somebody else may be here. While nobody confirms, time lasts longer, and the
suspect is asked on. Few calls are made where few are lost (``config.times_asked``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from crdt_store.liveness.config import CONFIRMATIONS, LivenessConfig
from crdt_store.liveness.losses import Losses
from crdt_store.liveness.messages import Claim, Standing
from fabric.core.ids import PeerId

FEW = 16
"""So many suspects may answer until the next call; of more, each call is short."""


@dataclass(slots=True)
class Suspicion:
    """Why and since when a peer is suspected.

    Attributes:
        incarnation: It answers with a higher one, or to us.
        since: When we heard of it first.
        next_ask: When we ask it again.
        accusers: Who says so, ourselves perhaps included.
        deadline: When its time is over.
        asked: How often we asked it.
        patient_until: When silence to the latest call is an answer.
    """

    incarnation: int
    since: float
    next_ask: float
    accusers: set[PeerId] = field(default_factory=set)
    deadline: float = math.inf
    asked: int = 0
    patient_until: float = -math.inf

    @property
    def over(self) -> float:
        """When it is dead, if it was asked often enough by then."""
        return max(self.deadline, self.patient_until)


class Suspicions:
    """All running suspicions of one peer.

    Args:
        config: Periods.
        losses: They set how often a suspect is asked.
    """

    def __init__(self, config: LivenessConfig, losses: Losses) -> None:
        self._losses = losses
        self._config = config
        self._running: dict[PeerId, Suspicion] = {}
        self._next = math.inf
        self._waits: dict[int, float] = {}
        self._waits_of = 0

    def __contains__(self, peer: object) -> bool:
        return peer in self._running

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def get(self, peer: PeerId) -> Suspicion | None:
        """Return the suspicion of ``peer``."""
        return self._running.get(peer)

    def heard_before(self, claim: Claim) -> bool:
        """Return whether an accusation adds nothing to a running suspicion.

        Most of what is heard while a ghost is mourned does not.
        """
        held = self._running.get(claim.subject)
        if held is None or claim.incarnation > held.incarnation:
            return False
        enough = len(held.accusers) > CONFIRMATIONS
        repeated = claim.standing is Standing.SUSPECT and claim.accuser in held.accusers
        return repeated or (enough and claim.standing is not Standing.ALIVE)

    def accuse(self, claim: Claim, now: float, num_members: int) -> bool:
        """Note an accusation; return whether others should hear of it.

        Args:
            claim: Who accuses whom; of a death, the suspect had its time there already.
            now: Monotonic seconds.
            num_members: Members that are there, which sets the timeout.
        """
        held = self._running.get(claim.subject)
        if held is None:
            first = now + self._gap(num_members)
            held = Suspicion(claim.incarnation, now, first)
            self._running[claim.subject] = held
        elif claim.incarnation > held.incarnation:
            held.incarnation = claim.incarnation
        accusers, proven = held.accusers, claim.standing is Standing.DEAD
        news = len(accusers) <= CONFIRMATIONS and claim.accuser not in accusers
        if news:
            accusers.add(claim.accuser)
        elif not proven:
            return False
        wait = self._wait(num_members, CONFIRMATIONS + 1 if proven else len(accusers))
        held.deadline = min(held.deadline, held.since + wait)
        self._next = min(self._next, held.next_ask, held.over)
        return news

    def _wait(self, num_members: int, voices: int) -> float:
        """Return the timeout; computed once per size of the mesh, as deaths repeat."""
        if num_members != self._waits_of:
            self._waits_of, self._waits = num_members, {}
        wait = self._waits.get(voices)
        if wait is None:
            wait = self._config.suspicion_seconds(num_members, voices)
            self._waits[voices] = wait
        return wait

    def lift(self, peer: PeerId) -> Suspicion | None:
        """Forget the suspicion of ``peer`` and return it."""
        if not self._running.keys() - {peer}:
            self._next = math.inf
        return self._running.pop(peer, None)

    # --- asking

    def _enough(self, num_members: int) -> int:
        return self._config.times_asked(num_members, self._losses.share)

    def _gap(self, num_members: int) -> float:
        least = self._config.shortest_suspicion(num_members)
        return least / (self._enough(num_members) + 1)

    def to_ask(
        self, now: float, num_members: int, patience: float
    ) -> list[tuple[PeerId, float]]:
        """Return whom to ask now, and until when each may answer that call.

        Args:
            now: Monotonic seconds.
            num_members: Members that are there.
            patience: Seconds after which silence is an answer.
        """
        if now < self._next:
            return []
        enough, chosen = self._enough(num_members), list[tuple[PeerId, float]]()
        gap, few = self._gap(num_members), len(self._running) <= FEW
        for peer, held in self._running.items():
            if now < held.next_ask:
                continue
            if held.asked >= enough and now + patience > held.deadline:
                held.next_ask = held.over  # there is no time for another answer
                continue
            held.asked += 1
            held.next_ask, held.patient_until = now + gap, now + patience
            until = held.patient_until
            chosen.append((peer, max(until, held.next_ask) if few else until))
        return chosen

    def due(self, now: float, num_members: int) -> list[PeerId]:
        """Return the suspects whose time is over; those to ask were asked."""
        if now < self._next:
            return []
        enough = self._enough(num_members)
        over: list[PeerId] = []
        self._next = math.inf
        for peer, held in self._running.items():
            spent = held.asked >= enough
            if spent and held.over <= now:
                over.append(peer)
            else:
                due = min(held.next_ask, held.over) if spent else held.next_ask
                self._next = min(self._next, due)
        return over

    def postpone(self, seconds: float) -> None:
        """Give everybody more time: we slept and could not have heard an answer."""
        for held in self._running.values():
            held.since += seconds
            held.deadline += seconds
            held.next_ask += seconds
            held.patient_until += seconds
            held.asked = max(0, held.asked - 1)
        self._next += seconds

    def next_timeout(self) -> float:
        """Return when :meth:`to_ask` or :meth:`due` may have somebody."""
        return self._next
