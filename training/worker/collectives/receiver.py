"""The thread that receives from one peer, and reduces while the next piece arrives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from typing_extensions import override

from fabric.core.errors import FabricError, RemoteProtocolError
from training.worker.collectives.choose import PIECE_BYTES
from training.worker.collectives.ends import End, Group, Task
from training.worker.collectives.errors import PeerLost
from training.worker.collectives.line import Member, Opened, ReceivingEnd
from training.worker.collectives.operation import Operation
from training.worker.collectives.schedule import Do
from training.worker.collectives.wire import Head, Kind


class Receiver(End):
    """Receives from one peer, in order; of point-to-point calls, by tag."""

    def __init__(
        self,
        group: Group,
        member: Member,
        opening: Callable[[], Opened],
        patience_seconds: float,
        *,
        by_tag: bool,
    ) -> None:
        super().__init__(group, member, opening, patience_seconds)
        self.end: ReceivingEnd | None = None
        self._by_tag = by_tag
        self._gone = False
        self._scratch = bytearray()
        self._shared: list[memoryview] = []

    def post(self, operation: Operation, index: int) -> None:
        """Expect what ``operation`` wants of the peer."""
        task = Task(operation, index, operation.program[index].span.start)
        with self._changed:
            self._tasks.append(task)
            gone = self._gone
            self._changed.notify()
        if gone:
            member = self.member
            operation.fail(PeerLost(member.name, member.rank, "has left the group"))

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.end is not None:
            self.end.wake()

    @override
    def _run(self) -> None:
        end = ReceivingEnd(self._opening(), self.member, self._patience)
        if end.memory is not None:
            whole = memoryview(end.memory)
            self._shared = [
                whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)
            ]
        self.end = end
        try:
            with end.errors():
                while not self._closing and self._turn(end):
                    pass
        except FabricError:
            if not self._closing:
                raise
        finally:
            self.end = None
            with contextlib.suppress(FabricError), end.errors():
                if self._group.error is not None:
                    end.say(Kind.ABORT, self._origin())
            end.close()

    def _turn(self, end: ReceivingEnd) -> bool:
        """Receive one piece; return False after a goodbye."""
        head = end.head(self._check)
        if head.kind is Kind.BYE:
            self._leave()
            return False
        task = self._wanted(end, head)
        operation, start, stop = task.operation, task.at, task.next_stop()
        wanted = (stop - start) * operation.memory.itemsize
        if head.length != wanted:
            raise RemoteProtocolError(
                f"{self.member.name} sent {head.length} B of {operation.label}, "
                f"not {wanted}"
            )
        self._take(end, head, task, stop)
        task.at = stop
        if stop == task.stop:
            # first: who posts next must find the queue without it
            with self._changed:
                self._tasks.remove(task)
        operation.advance(task.index, stop)
        return True

    def _take(self, end: ReceivingEnd, head: Head, task: Task, stop: int) -> None:
        operation, index, start = task.operation, task.index, task.at
        memory = operation.memory
        reduce = operation.program[index].do is Do.REDUCE
        landing = None if reduce else memory.landing(start, stop)

        def idle() -> None:
            self._check()
            end.say(Kind.BEAT)

        def ready() -> None:
            operation.wait(index, stop, end.pulse.beat_seconds, idle)

        if head.kind is Kind.SLOT:
            if head.value >= len(self._shared):
                raise RemoteProtocolError(f"no slot {head.value}")
            data = self._shared[head.value][: head.length]
            ready()
        elif landing is not None:
            ready()
            end.read(landing, self._check, f"in {operation.label}")
            return
        else:
            data = self._room(head.length)
            end.read(data, self._check, f"in {operation.label}")
            ready()
        (memory.reduce if reduce else memory.write)(start, stop, data)
        if head.kind is Kind.SLOT:
            end.bytes_moved += head.length
            end.say(Kind.FREE, head.value)

    def _wanted(self, end: ReceivingEnd, head: Head) -> Task:
        """Return the task that ``head`` is for, waiting until it is posted."""
        while True:
            with self._changed:
                task = self._match(head)
                if task is None and not self._closing:
                    self._changed.wait(end.pulse.beat_seconds)
                    task = self._match(head)
            if task is not None:
                return task
            self._check()
            if self._closing:
                raise end.lost("the group was closed")
            end.say(Kind.BEAT)

    def _match(self, head: Head) -> Task | None:
        if self._by_tag:
            return next((t for t in self._tasks if t.operation.tag == head.tag), None)
        if not self._tasks:
            return None
        first = self._tasks[0]
        operation = first.operation
        if (operation.sequence, operation.tag) != (head.sequence, head.tag):
            raise RemoteProtocolError(
                f"{self.member.name} runs another collective: its number "
                f"{head.sequence}, ours {operation.sequence}, {operation.label}"
            )
        return first

    def _leave(self) -> None:
        """Fail who still waits for a peer that said goodbye."""
        with self._changed:
            self._gone = True
            left = [task.operation for task in self._tasks]
        for operation in left:
            member = self.member
            operation.fail(PeerLost(member.name, member.rank, "has left the group"))

    def _room(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        return memoryview(self._scratch)[:size]
