"""The first stage's schedule: which tokens of which sequence go into the next step.

    waiting --slot free--> running: fed < known --step--> fed == known --pick--> ...
                              ^                                           |
                              +-------------- one more known -------------+
                                          pick with finish, or cancel --> gone

A sequence is its known tokens (prompt, then what was picked) and how many of them were
fed. Prefill and decode differ only in how many are left. A step takes every sequence
with one token left (decode) and fills up with prompt chunks, so a long prompt delays
the others by a bounded step (Sarathi-Serve, arXiv:2403.02310).

A step waits a little for more sequences, because a batch costs hardly more than one;
never longer than half a step. When stages are re-wired, ``restart`` feeds everything
again from the first token: picked tokens stay as they are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fabric.core.errors import ResourceExhausted
from inference.worker_messages import Opening, Row

_MAX_WAIT_SECONDS = 0.02
_SMOOTHING = 0.2


@dataclass
class Sequence:
    """One session in progress."""

    number: int
    opening: Opening
    known: list[int]
    fed: int = 0
    slot: int = -1

    @property
    def left(self) -> int:
        """Tokens known and not fed; 0 while a pick is awaited."""
        return len(self.known) - self.fed


@dataclass(frozen=True)
class Slice:
    """Tokens of one sequence to compute in a step."""

    row: Row
    tokens: tuple[int, ...]


@dataclass
class Schedule:
    """Sequences of the first stage.

    Args:
        max_sequences: Slots of KV memory.
        max_waiting: Sequences that may wait for one.
        prefill_tokens: Prompt tokens per step.
        stages: Length of the chain: that many batches can be under way at once.
    """

    max_sequences: int
    max_waiting: int
    prefill_tokens: int
    stages: int = 1
    _next_number: int = 1
    _running: dict[int, Sequence] = field(default_factory=dict)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _free: list[int] = field(default_factory=list)
    _ready_since: float | None = None
    _step_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._free = list(reversed(range(self.max_sequences)))

    def submit(self, opening: Opening, prompt: tuple[int, ...], now: float) -> None:
        """Add a session.

        Raises:
            ResourceExhausted: all slots and waiting places are taken.
        """
        if not self._free and len(self._waiting) >= self.max_waiting:
            raise ResourceExhausted("no place for another session", code="E_BUSY")
        self._waiting.append(Sequence(self._next_number, opening, list(prompt)))
        self._next_number += 1
        self._admit(now)

    def pick(self, number: int, token: int, finish: str, now: float) -> Opening | None:
        """Take in a picked token; return the opening of a sequence that ended by it.

        A sequence that is gone, or did not ask, is ignored.
        """
        sequence = self._running.get(number)
        if sequence is None or sequence.left:
            return None
        if finish:
            self._drop(sequence, now)
            return sequence.opening
        sequence.known.append(token)
        self._touch(now)
        return None

    def cancel(self, session: str, reply_to: str, now: float) -> bool:
        """Forget a session; return whether it was there."""
        for sequence in [*self._running.values(), *self._waiting]:
            opening = sequence.opening
            if (opening.session, opening.reply_to) == (session, reply_to):
                self._drop(sequence, now)
                return True
        return False

    def restart(self, stages: int, now: float) -> None:
        """Feed every sequence again from its first token, through new stages."""
        self.stages = stages
        for sequence in self._running.values():
            sequence.fed = 0
        self._touch(now)

    def take(self, now: float) -> list[Slice]:
        """Return the next step's slices, at most one a sequence; empty: wait."""
        if not self._due(now):
            return []
        self._ready_since = None
        slices = []
        budget = self.prefill_tokens
        for sequence in sorted(self._running.values(), key=lambda s: s.left != 1):
            if not sequence.left or (sequence.left > 1 and budget <= 0):
                continue
            length = min(sequence.left, max(budget, 1))
            if sequence.left > 1:
                budget -= length
            slices.append(self._slice(sequence, length))
        if any(s.left for s in self._running.values()):
            self._ready_since = now  # more prompt to feed in the next step
        return slices

    def next_timeout(self) -> float | None:
        """Return when ``take`` will have a step at the latest, None when idle."""
        if self._ready_since is None:
            return None
        return self._ready_since + min(_MAX_WAIT_SECONDS, self._step_seconds / 2)

    def stepped(self, seconds: float) -> None:
        """Learn how long a step takes."""
        self._step_seconds += _SMOOTHING * (seconds - self._step_seconds)

    def picked(self) -> list[tuple[Opening, int, int]]:
        """Return (opening, index, token) of everything picked for running sessions."""
        return [
            (s.opening, index, token)
            for s in self._running.values()
            for index, token in enumerate(s.known[s.opening.prompt_tokens :])
        ]

    def openings(self) -> list[Opening]:
        """Return the openings of all sessions."""
        return [s.opening for s in [*self._running.values(), *self._waiting]]

    def check_integrity(self) -> None:
        """Assert the invariants."""
        used = [s.slot for s in self._running.values()]
        assert sorted(used + self._free) == list(range(self.max_sequences))
        assert not (self._waiting and self._free)
        assert all(0 <= s.fed <= len(s.known) for s in self._running.values())
        fed = any(s.left for s in self._running.values())
        assert fed == (self._ready_since is not None)

    def _due(self, now: float) -> bool:
        deadline = self.next_timeout()
        if deadline is None:
            return False
        left = [s.left for s in self._running.values() if s.left]
        enough = -(-len(self._running) // self.stages)
        return len(left) >= enough or max(left) > 1 or now >= deadline

    def _slice(self, sequence: Sequence, length: int) -> Slice:
        start, sequence.fed = sequence.fed, sequence.fed + length
        row = Row(
            sequence.number,
            sequence.slot,
            start,
            length,
            sample=not sequence.left,
            opening=None if start else sequence.opening,
        )
        return Slice(row, tuple(sequence.known[start : start + length]))

    def _drop(self, sequence: Sequence, now: float) -> None:
        if sequence.slot < 0:
            self._waiting.remove(sequence)
            return
        del self._running[sequence.number]
        self._free.append(sequence.slot)
        if not any(s.left for s in self._running.values()):
            self._ready_since = None
        self._admit(now)

    def _admit(self, now: float) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._running[sequence.number] = sequence
            self._touch(now)

    def _touch(self, now: float) -> None:
        if self._ready_since is None and any(s.left for s in self._running.values()):
            self._ready_since = now
