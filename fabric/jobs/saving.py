"""Which checkpoints a coordinator asks of whom while the rounds go on. Pure.

At most one is asked for at a time: when saving is slower than the rounds between two
checkpoints, those in between are left out. The last state of all is another matter: the
job is not complete without it (``coordinator.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fabric.core.digest import rendezvous_order
from fabric.core.ids import JobId, PeerId
from fabric.jobs.spec import JobSpec


class Order(NamedTuple):
    """``peer`` should save the state of ``round``."""

    peer: PeerId
    round: int


class Saves:
    """The checkpoints of one generation, the last one left out.

    Args:
        job: The job.
        spec: Its spec.
    """

    def __init__(self, job: JobId, spec: JobSpec) -> None:
        self._job = job
        train = spec.kind == "train"
        self._every = spec.checkpoint.every_rounds if train else 0
        self._last = spec.train.outer.rounds
        self._patience = spec.fault.patience_seconds
        self._due: int | None = None
        self._due_since = 0.0
        self._asked: Order | None = None
        self._failed: set[PeerId] = set()

    def decided(self, round_number: int, now: float) -> None:
        """All will soon hold the state of ``round_number``."""
        due = self._every and round_number % self._every == 0
        if due and round_number < self._last:
            self._due, self._due_since = round_number, now
            self._failed = set()

    def next_order(
        self, held: Mapping[PeerId, int], live: frozenset[PeerId], now: float
    ) -> Order | None:
        """Return what to ask of whom now.

        The rendezvous order of (job, round) spreads the work; its first gets a patience
        to hold the state.

        Args:
            held: Which round's state each participant holds.
            live: Participants that are not lost.
            now: Monotonic seconds.
        """
        if self._asked is not None and self._asked.peer not in live:
            self._asked = None
        if self._due is None or self._asked is not None:
            return None
        key = f"{self._job}/{self._due}".encode()
        order = rendezvous_order(key, live - self._failed)
        holders = [
            PeerId(name) for name in order if held.get(PeerId(name)) == self._due
        ]
        late = now - self._due_since >= self._patience
        if not holders or (holders[0] != order[0] and not late):
            return None
        self._asked = Order(holders[0], self._due)
        return self._asked

    def answered(self, peer: PeerId, round_number: int, *, saved: bool) -> bool:
        """Note how an order ended; return False when none such was given."""
        if self._asked != (peer, round_number):
            return False
        self._asked = None
        if not saved:
            self._failed.add(peer)
        elif self._due == round_number:
            self._due = None
        return True
