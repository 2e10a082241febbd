"""Suspects and how long each may still answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from crdt_store.liveness.config import CONFIRMATIONS, LivenessConfig
from crdt_store.liveness.messages import Claim, Standing
from fabric.core.ids import PeerId


@dataclass(slots=True)
class Suspicion:
    """Why and since when a peer is suspected.

    Attributes:
        incarnation: It answers with a higher one, or to us.
        since: When we heard of it first.
        accusers: Who says so, ourselves perhaps included.
        deadline: When its time is over.
        tried: We ourselves asked it since, in vain or not yet answered.
    """

    incarnation: int
    since: float
    accusers: set[PeerId] = field(default_factory=set)
    deadline: float = math.inf
    tried: bool = False


class Suspicions:
    """All running suspicions of one peer."""

    def __init__(self, config: LivenessConfig) -> None:
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

    def accuse(self, claim: Claim, now: float, num_members: int) -> bool:
        """Note an accusation; return whether others should hear of it.

        Args:
            claim: Who accuses whom; of a death, the suspect had its time there already.
            now: Monotonic seconds.
            num_members: Members that are there, which sets the timeout.
        """
        held = self._running.get(claim.subject)
        if held is None:
            held = self._running[claim.subject] = Suspicion(claim.incarnation, now)
        elif claim.incarnation > held.incarnation:
            held.incarnation = claim.incarnation
        accusers, proven = held.accusers, claim.standing is Standing.DEAD
        news = len(accusers) <= CONFIRMATIONS and claim.accuser not in accusers
        if news:
            accusers.add(claim.accuser)
        elif not proven:
            return False  # said before: most of what is heard while a ghost is mourned
        wait = self._wait(num_members, CONFIRMATIONS + 1 if proven else len(accusers))
        held.deadline = min(held.deadline, held.since + wait)
        self._next = min(self._next, held.deadline)
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

    def due(self, now: float) -> list[PeerId]:
        """Return the suspects whose time is over."""
        if now < self._next:
            return []
        over = [peer for peer, s in self._running.items() if s.deadline <= now]
        self._next = min((s.deadline for s in self._running.values()), default=math.inf)
        return over

    def extend(self, peer: PeerId, until: float) -> None:
        """Give ``peer`` time until then for its last answer."""
        held = self._running[peer]
        held.tried, held.deadline = True, until
        self._next = min(self._next, until)

    def postpone(self, seconds: float) -> None:
        """Give everybody more time: we slept and could not have heard an answer."""
        for suspicion in self._running.values():
            suspicion.since += seconds
            suspicion.deadline += seconds
            suspicion.tried = False
        self._next += seconds

    def next_timeout(self) -> float:
        """Return when :meth:`due` may have somebody."""
        return self._next
