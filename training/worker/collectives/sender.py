"""The thread that sends to one peer: through the socket, or a slot of shared memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import numpy as np
from typing_extensions import override

from fabric.core.errors import FabricError, RemoteProtocolError
from training.worker.collectives.choose import PIECE_BYTES
from training.worker.collectives.ends import SMALL_BYTES, End, Group, Task
from training.worker.collectives.line import AbortHeard, Member, Opened, SendingEnd
from training.worker.collectives.operation import Operation
from training.worker.collectives.wire import Head, Kind


class Sender(End):
    """Sends to one peer, in order."""

    def __init__(
        self,
        group: Group,
        member: Member,
        opening: Callable[[], Opened],
        patience_seconds: float,
    ) -> None:
        super().__init__(group, member, opening, patience_seconds)
        self.end: SendingEnd | None = None
        self._moving = threading.Lock()
        self._slots: list[int] = []
        self._shared: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    def post(self, operation: Operation, index: int) -> None:
        """Send what ``operation`` has for the peer: now if it is small, or in turn."""
        task = Task(operation, index, operation.program[index].span.start)
        if self._now(task):
            return
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def close(self, *, at_once: bool = False) -> None:
        """Say goodbye after what is queued, or tell why the group is over."""
        with self._changed:
            self._closing = True
            if at_once:
                self._tasks.clear()
            self._changed.notify()

    def _now(self, task: Task) -> bool:
        """Send ``task`` from the caller's thread if nothing has to be waited for."""
        span = task.operation.program[task.index].span
        if span.size * task.operation.memory.itemsize > SMALL_BYTES:
            return False
        if self._tasks or self.end is None or self._group.error is not None:
            return False
        if not task.operation.may(task.index, task.stop):
            return False
        if not self._moving.acquire(blocking=False):
            return False
        try:
            if self._tasks:
                return False
            with self.end.errors():
                self._transfer(self.end, task)
        except AbortHeard as heard:
            self._group.heard_abort(heard.rank, self.member)
        except FabricError as error:
            self._group.suspect(error)
        finally:
            self._moving.release()
        return True

    @override
    def _run(self) -> None:
        end = SendingEnd(self._opening(), self.member, self._patience)
        if end.memory is not None:
            whole = np.frombuffer(end.memory, np.uint8)
            self._shared = list(whole.reshape(-1, PIECE_BYTES))
            self._slots = list(range(len(self._shared)))
        self.end = end
        try:
            with end.errors():
                while self._turn(end):
                    pass
        finally:
            self.end = None
            with self._moving, contextlib.suppress(FabricError), end.errors():
                if self._group.error is not None:
                    end.write(Head(Kind.ABORT, value=self._origin()).encode(), _stop)
            end.close()

    def _turn(self, end: SendingEnd) -> bool:
        """Send the next task or a beat; return False when it was the last."""
        beat = end.pulse.beat_seconds
        with self._changed:
            if not (self._tasks or self._closing or self._group.error):
                self._changed.wait(beat)
            task = self._tasks[0] if self._tasks else None
            closing = self._closing
        if self._group.error is not None:
            return False
        with self._moving:
            if task is not None:
                self._transfer(end, task)
            elif closing:
                end.write(Head(Kind.BYE).encode(), self._check)
                return False
            else:
                end.beat()
                end.hear()
        if task is not None:
            with self._changed:
                if self._tasks:
                    self._tasks.popleft()
        return True

    def _transfer(self, end: SendingEnd, task: Task) -> None:
        operation, index = task.operation, task.index

        def idle() -> None:
            self._check()
            end.beat()
            end.hear()

        while task.at < task.stop:
            stop = task.next_stop()
            operation.wait(index, stop, end.pulse.beat_seconds, idle)
            self._piece(end, operation, task.at, stop)
            task.at = stop
            operation.advance(index, stop)

    def _piece(
        self, end: SendingEnd, operation: Operation, start: int, stop: int
    ) -> None:
        data = operation.memory.read(start, stop)
        size = len(data)
        tag, sequence = operation.tag, operation.sequence
        if self._shared and size > SMALL_BYTES:
            slot = self._slot(end)
            np.copyto(self._shared[slot][:size], np.frombuffer(data, np.uint8))
            head = Head(Kind.SLOT, tag, sequence, slot, size).encode()
            end.write(head, self._check)
            end.bytes_moved += size
            return
        head = Head(Kind.PIECE, tag, sequence, 0, size).encode()
        if size <= SMALL_BYTES:
            end.write(head + data, self._check)
        else:
            end.write(head, self._check)
            end.write(data, self._check)

    def _slot(self, end: SendingEnd) -> int:
        """Return a free slot, waiting for one."""
        while not self._slots:
            if not end.freed and not end.listen():
                self._check()
                end.beat()
                if end.pulse.missed():
                    raise end.silent("while we waited for a free slot")
            for slot in end.freed:
                if slot >= len(self._shared) or slot in self._slots:
                    raise RemoteProtocolError(f"{self.member.name} freed slot {slot}")
                self._slots.append(slot)
            end.freed.clear()
        return self._slots.pop()


def _stop() -> None:
    """Do not wait: the group is over."""
    raise FabricError("no time to say why")
