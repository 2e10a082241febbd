"""Overlap with a fixed order: flows that pause whenever their bytes are on the way.

A flow is a generator that starts an exchange, yields, and goes on with what came. Each
flow that enters moves all flows before it one pause on, the oldest first. So while one
unit of the model computes, the exchanges of the units before it are under way, each one
stage further. The order of exchanges depends on the order of entering alone, not on
what is ready: every rank starts the same exchanges in the same order, as collectives
demand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

Stages = Generator[None, None, None]


class Pipeline:
    """Flows in the order in which they entered."""

    def __init__(self) -> None:
        self._flows: deque[tuple[int, Stages]] = deque()

    def push(self, key: int, flow: Stages) -> None:
        """Move all flows on by one pause, then start ``flow``."""
        self.advance()
        self._flows.append((key, flow))
        self._move(len(self._flows) - 1)

    def advance(self) -> None:
        """Move all flows on by one pause, the oldest first."""
        for _ in range(len(self._flows)):
            key, flow = self._flows.popleft()
            if next(flow, self) is not self:
                self._flows.append((key, flow))

    def finish(self, key: int) -> None:
        """Move all flows on until the one with ``key`` has ended."""
        while any(found == key for found, _ in self._flows):
            self.advance()

    def drain(self) -> None:
        """Let every flow end."""
        while self._flows:
            self.advance()

    def drop(self) -> None:
        """Forget every flow: a peer failed, and the state is to be loaded again."""
        while self._flows:
            self._flows.popleft()[1].close()

    def _move(self, index: int) -> None:
        if next(self._flows[index][1], self) is self:
            del self._flows[index]
