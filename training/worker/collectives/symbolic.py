"""Runs schedules on sets instead of numbers: what is where, and counted how often.

The value of an element is the set of (rank, address) that it contains, as the bits of
an integer. Reducing values that share a contribution, finishing twice, or sending what
was never written, is an error. Ranks follow their programs under the waits of
``hazards.py``; whatever else is possible at once happens in an order drawn by ``rng``.

Links hold as little as the executor's do at least: a message that is to be reduced
waits in one buffer, one that overwrites goes straight to where it belongs. A schedule
that ends here ends with any buffers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fabric.core.errors import LocalProtocolError
from training.worker.collectives.hazards import waits_of
from training.worker.collectives.schedule import Do, Schedule, Span, program

Space = list[int]
"""A rank's elements; 0 is one that was never written."""


def contribution(rank: int, address: int, addresses: int) -> int:
    """Return the value that only ``rank`` has at ``address`` at the start."""
    return 1 << (rank * addresses + address)


def run(
    schedule: Schedule, spaces: Sequence[Space], rng: random.Random
) -> list[set[int]]:
    """Run ``schedule`` on ``spaces``; return the addresses that each rank finished.

    Raises:
        LocalProtocolError: the schedule is wrong, or the ranks wait for each other.
    """
    machine = _Machine(schedule, spaces)
    while (event := machine.draw(rng)) is not None:
        machine.step(event)
    machine.check_ended()
    return machine.finished


@dataclass
class _Link:
    """Numbers of the operations at both ends, and what is under way."""

    source: int
    target: int
    sends: deque[int] = field(default_factory=deque)
    takes: deque[int] = field(default_factory=deque)
    flying: list[int] | None = None


class _Machine:
    def __init__(self, schedule: Schedule, spaces: Sequence[Space]) -> None:
        self.spaces = spaces
        self.finished: list[set[int]] = [set() for _ in spaces]
        self._programs = [program(schedule, rank) for rank in range(len(spaces))]
        self._waits = [waits_of(p) for p in self._programs]
        self._done = [[False] * len(p) for p in self._programs]
        self._links: dict[tuple[int, int], _Link] = {}
        self._finishes: list[tuple[int, int]] = []
        for rank, ops in enumerate(self._programs):
            for number, op in enumerate(ops):
                if op.do is Do.FINISH:
                    self._finishes.append((rank, number))
                elif op.do is Do.SEND:
                    self._link(rank, op.peer).sends.append(number)
                else:
                    self._link(op.peer, rank).takes.append(number)
        self._live = list(self._links.values())

    def draw(self, rng: random.Random) -> _Link | tuple[int, int] | None:
        """Return one of the things that can happen next, or None."""
        self._live = [link for link in self._live if link.takes or link.sends]
        events: list[_Link | tuple[int, int]] = [*self._live, *self._finishes]
        while events:
            # an event that cannot happen is drawn away: no need to look at all
            at = rng.randrange(len(events))
            events[at], events[-1] = events[-1], events[at]
            event = events.pop()
            if isinstance(event, tuple):
                if self._free(*event):
                    return event
            elif self._can_move(event):
                return event
        return None

    def step(self, what: _Link | tuple[int, int]) -> None:
        """Let it happen."""
        if isinstance(what, tuple):
            self._finishes.remove(what)
            self._finish(*what)
            return
        if what.flying is None:
            self._depart(what)
            if self._programs[what.target][what.takes[0]].do is Do.REDUCE:
                return
        self._arrive(what)

    def check_ended(self) -> None:
        """Raise if a rank has something left to do."""
        for rank, done in enumerate(self._done):
            if not all(done):
                op = self._programs[rank][done.index(False)]
                raise LocalProtocolError(f"rank {rank} waits for ever at {op}")

    def _link(self, source: int, target: int) -> _Link:
        key = (source, target)
        return self._links.setdefault(key, _Link(source, target))

    def _can_move(self, link: _Link) -> bool:
        if not link.takes:
            return False
        take_free = self._free(link.target, link.takes[0])
        if link.flying is not None:
            return take_free
        if not link.sends or not self._free(link.source, link.sends[0]):
            return False
        buffered = self._programs[link.target][link.takes[0]].do is Do.REDUCE
        return buffered or take_free

    def _free(self, rank: int, number: int) -> bool:
        return all(self._done[rank][w.on] for w in self._waits[rank][number])

    def _finish(self, rank: int, number: int) -> None:
        self._done[rank][number] = True
        for address in _addresses(self._programs[rank][number].span):
            if address in self.finished[rank]:
                raise LocalProtocolError(f"rank {rank} finishes {address} twice")
            self.finished[rank].add(address)

    def _depart(self, link: _Link) -> None:
        number = link.sends.popleft()
        self._done[link.source][number] = True
        span = self._programs[link.source][number].span
        link.flying = [self.spaces[link.source][a] for a in _addresses(span)]
        if not all(link.flying):
            raise LocalProtocolError(f"rank {link.source} sends what it has not")

    def _arrive(self, link: _Link) -> None:
        number = link.takes.popleft()
        op = self._programs[link.target][number]
        values, link.flying = link.flying or [], None
        self._done[link.target][number] = True
        if op.span.size != len(values):
            raise LocalProtocolError(f"{len(values)} elements meet {op}")
        space = self.spaces[link.target]
        for address, value in zip(_addresses(op.span), values, strict=True):
            if op.do is not Do.REDUCE:
                space[address] = value
            elif space[address] & value:
                raise LocalProtocolError(f"rank {link.target} counts {address} twice")
            else:
                space[address] |= value


def _addresses(span: Span) -> range:
    return range(span.start, span.stop)
