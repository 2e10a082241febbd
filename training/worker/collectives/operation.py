"""One collective under way: how far each of its operations is, and who waits.

Threads of links move the pieces; each asks here before it touches a span and says when
it has. The thread that finds nothing to wait for takes no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from fabric.core.errors import FabricError
from training.worker.collectives.hazards import Waits
from training.worker.collectives.schedule import Do, Program


class Memory(Protocol):
    """The address space of one rank, as bytes."""

    itemsize: int

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes of elements; valid until the next call of this thread."""
        ...

    def landing(self, start: int, stop: int) -> memoryview | None:
        """Return where bytes may be received straight; None: use :meth:`write`."""
        ...

    def write(self, start: int, stop: int, data: memoryview) -> None:
        """Overwrite elements."""
        ...

    def reduce(self, start: int, stop: int, data: memoryview) -> None:
        """Combine elements with ``data``."""
        ...

    def finish(self, start: int, stop: int) -> None:
        """Turn what was combined into the result."""
        ...


class Operation:
    """One run of a program.

    Args:
        label: For people: "all_reduce of 16777216 float32".
        sequence: Number in its group; the same on every rank.
        tag: What all ranks must agree on.
        program: What we do.
        waits: Of ``program``.
        memory: Ours; belongs to the operation until it ends.
        deadline: Monotonic seconds at which it fails.
        on_end: Called once, by the thread that ended it.
    """

    def __init__(
        self,
        label: str,
        sequence: int,
        tag: int,
        program: Program,
        waits: Waits,
        memory: Memory,
        deadline: float,
        on_end: Callable[[FabricError | None], None],
    ) -> None:
        self.label = label
        self.sequence = sequence
        self.tag = tag
        self.program = program
        self.memory = memory
        self.deadline = deadline
        self.error: FabricError | None = None
        self._waits = waits
        self._on_end = on_end
        self._done = [0] * len(program)
        self._sizes = [op.span.size for op in program]
        self._left = len(program)
        self._condition = threading.Condition()
        self._waiting = 0
        self._ended = False

    def may(self, index: int, stop: int) -> bool:
        """Return whether operation ``index`` may touch its elements up to ``stop``."""
        done = self._done
        return all(done[w.on] >= w.needed(stop) for w in self._waits[index])

    def wait(
        self, index: int, stop: int, beat_seconds: float, idle: Callable[[], object]
    ) -> None:
        """Return when operation ``index`` may touch its elements up to ``stop``.

        Args:
            index: In the program.
            stop: Address.
            beat_seconds: How often ``idle`` is called meanwhile; it may raise.
            idle: Says that we are alive.

        Raises:
            FabricError: the operation failed meanwhile.
        """
        while not self.may(index, stop):
            with self._condition:
                self._waiting += 1
                try:
                    if self.error is None and not self.may(index, stop):
                        in_time = self._condition.wait(beat_seconds)
                    else:
                        in_time = True
                finally:
                    self._waiting -= 1
            self.check()
            if not in_time:
                idle()
        self.check()

    def check(self) -> None:
        """Raise what the operation failed with, if it did."""
        if self.error is not None:
            raise self.error

    def advance(self, index: int, stop: int) -> None:
        """Note that operation ``index`` has done its elements up to ``stop``."""
        done = stop - self.program[index].span.start
        self._done[index] = done
        # read after the write: a waiter counts itself before it looks
        if self._waiting:
            with self._condition:
                self._condition.notify_all()
        if done == self._sizes[index]:
            with self._condition:
                self._left -= 1
                last = self._left == 0
            if last:
                self._end(None)

    def fail(self, error: FabricError) -> None:
        """End the operation with ``error``, unless it has ended."""
        with self._condition:
            if self._ended or self.error is not None:
                return
            self.error = error
            self._condition.notify_all()
        self._end(error)

    def end_if_empty(self) -> None:
        """End a program that has nothing to do."""
        if not self.program:
            self._end(None)

    def waits_for(self) -> int:
        """Return the peer of the first receive that is not done, or -1."""
        for op, done in zip(self.program, self._done, strict=True):
            if op.do in (Do.RECEIVE, Do.REDUCE) and done < op.span.size:
                return op.peer
        return -1

    def _end(self, error: FabricError | None) -> None:
        with self._condition:
            if self._ended:
                return
            self._ended = True
        self._on_end(error)
