"""What the sending and the receiving thread of a pair share.

    operation --queue--> Sender thread --socket--> Receiver thread --> operation

Both only move pieces and ask the operation first; what goes wrong they tell their
group, once. Queues are as long as one operation's program: a group runs one collective
at a time, and a point-to-point call is one entry that its caller holds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fabric.core.errors import FabricError, LocalProtocolError
from training.worker.collectives.choose import PIECE_BYTES
from training.worker.collectives.errors import PeerSilent, blamed
from training.worker.collectives.line import AbortHeard, Member, Opened
from training.worker.collectives.operation import Operation
from training.worker.collectives.wire import NOBODY

SMALL_BYTES = 1 << 14
"""Up to this a piece and its head leave in one call, and not through shared memory."""


class Group(Protocol):
    """What the threads tell: one collective group."""

    error: FabricError | None

    def suspect(self, error: FabricError) -> None:
        """A connection ended; someone may say whose fault it was."""
        ...

    def heard_abort(self, rank: int, member: Member) -> None:
        """``member`` says that the group is over because of ``rank``."""
        ...


@dataclass
class Task:
    """One span of an operation, and how far it is."""

    operation: Operation
    index: int
    at: int
    """Next address."""

    @property
    def stop(self) -> int:
        """Where the span ends."""
        return self.operation.program[self.index].span.stop

    def next_stop(self) -> int:
        """Return the address at which the next piece ends."""
        elements = max(1, PIECE_BYTES // self.operation.memory.itemsize)
        return min(self.stop, self.at + elements)


class End:
    """What the two threads share."""

    def __init__(
        self,
        group: Group,
        member: Member,
        opening: Callable[[], Opened],
        patience_seconds: float,
    ) -> None:
        self.member = member
        self._group = group
        self._opening = opening
        self._patience = patience_seconds
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        """Connect, and serve until the group ends."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the thread, at most ``seconds``."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            self._run()
        except AbortHeard as heard:
            self._group.heard_abort(heard.rank, self.member)
        except FabricError as error:
            self._group.suspect(error)
        except Exception as exc:  # noqa: BLE001 - or the operation would never end
            self._group.suspect(LocalProtocolError(f"{self.member.name}: {exc!r}"))

    def _run(self) -> None:
        raise NotImplementedError

    def _check(self) -> None:
        """Raise if the group is over or the oldest operation is out of time."""
        if self._group.error is not None:
            raise self._group.error
        with self._changed:
            oldest = self._tasks[0].operation if self._tasks else None
        if oldest is None:
            return
        oldest.check()
        if time.monotonic() > oldest.deadline:
            rank, name = self.member.rank, self.member.name
            raise PeerSilent(name, rank, f"{oldest.label} is out of time")

    def _origin(self) -> int:
        """Return the rank to name in an abort."""
        error = self._group.error
        rank = blamed(error) if error is not None else -1
        return NOBODY if rank < 0 else rank
