"""Suspects and how long each may still answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from crdt_store.liveness.config import CONFIRMATIONS, LivenessConfig
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

    def __contains__(self, peer: object) -> bool:
        return peer in self._running

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def get(self, peer: PeerId) -> Suspicion | None:
        """Return the suspicion of ``peer``."""
        return self._running.get(peer)

    def accuse(
        self,
        peer: PeerId,
        accuser: PeerId,
        incarnation: int,
        now: float,
        num_members: int,
        *,
        proven: bool = False,
    ) -> bool:
        """Note an accusation; return whether others should hear of it.

        Args:
            peer: The suspect.
            accuser: Who says so.
            incarnation: In which it was silent.
            now: Monotonic seconds.
            num_members: Members that are there, which sets the timeout.
            proven: For the accuser the suspect had its time already.
        """
        held = self._running.get(peer)
        if held is None:
            held = self._running[peer] = Suspicion(incarnation, now)
        held.incarnation = max(held.incarnation, incarnation)
        news = accuser not in held.accusers and len(held.accusers) <= CONFIRMATIONS
        if news:
            held.accusers.add(accuser)
        elif not proven:
            return False  # said before: most of what is heard while a ghost is mourned
        voices = CONFIRMATIONS + 1 if proven else len(held.accusers)
        wait = self._config.suspicion_seconds(num_members, voices)
        held.deadline = min(held.deadline, held.since + wait)
        self._next = min(self._next, held.deadline)
        return news

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
