"""One group of ranks: its collectives in order, its connections, its end.

A group ends once, with one error, on every rank: who sees a connection break waits a
moment for someone who knows better, then tells its other peers whose fault it was.
Nothing of a group outlives :meth:`Engine.close`; a new group with whoever is left is a
new engine in the same process.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fabric.core.errors import FabricError, LocalProtocolError
from training.worker.collectives.choose import PIECE_BYTES
from training.worker.collectives.errors import Aborted, PeerLost, PeerSilent
from training.worker.collectives.hazards import Waits, waits_of
from training.worker.collectives.line import Member, Opened, check_rank_untrusted
from training.worker.collectives.operation import Memory, Operation
from training.worker.collectives.receiver import Receiver
from training.worker.collectives.schedule import Do, Op, Program, Span
from training.worker.collectives.sender import Sender

GRACE_SECONDS = 0.1
"""Long enough for an abort that names the culprit to overtake a broken connection."""
MAX_QUEUED = 1 << 14
"""Collectives that a program may start before the first has ended."""
CLOSE_SECONDS = 5.0
"""How long threads may take to leave."""
COLLECTIVE, POINT_TO_POINT = "collective", "p2p"
Done = Callable[[FabricError | None], None]


class Connector(Protocol):
    """Connected, authenticated sockets between the members of one group."""

    def dial(self, rank: int, channel: str) -> Opened:
        """Return a new connection on which we send to ``rank``."""
        ...

    def accept(self, rank: int, channel: str) -> Opened:
        """Return the connection that ``rank`` dialled to us."""
        ...

    def close(self) -> None:
        """Accept no more."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A collective that is ready to run."""

    program: Program
    memory: Memory
    waits: Waits


@dataclass(frozen=True)
class Job:
    """A collective in the queue.

    Attributes:
        label: What all ranks must agree on, for people too.
        prepare: Called by the group's thread when its turn comes.
        finish: Called by the group's thread when all pieces are there.
        done: Called at the end, with the error if there was one.
    """

    label: str
    prepare: Callable[[], Prepared]
    finish: Callable[[], None]
    done: Done


class Engine:
    """The collectives of one rank in one group.

    Args:
        rank: Ours.
        names: Of all members, by rank: what errors call them.
        connector: Owned by the engine from here on.
        patience_seconds: Silence of a peer for longer ends the group.
        timeout_seconds: An operation that takes longer ends the group.
    """

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        connector: Connector,
        *,
        patience_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.names = tuple(names)
        self.timeout_seconds = timeout_seconds
        self.error: FabricError | None = None
        self._connector = connector
        self._patience = patience_seconds
        self._jobs: queue.Queue[Job | None] = queue.Queue(MAX_QUEUED)
        self._senders: dict[tuple[int, str], Sender] = {}
        self._receivers: dict[tuple[int, str], Receiver] = {}
        self._running: set[Operation] = set()
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._closed = False
        self._sequence = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.names)

    def submit(self, job: Job) -> None:
        """Run ``job`` after those submitted before."""
        if self._closed:
            job.done(self.error or Aborted("the group is closed"))
            return
        self._jobs.put(job)

    def point_to_point(self, do: Do, peer: int, tag: int, job: Job) -> Operation:
        """Send to or receive from ``peer``, beside the collectives."""
        prepared = job.prepare()

        def end(error: FabricError | None) -> None:
            if error is None:
                job.finish()
            self._forget(operation)
            job.done(error)

        operation = Operation(
            job.label,
            0,
            tag,
            prepared.program,
            prepared.waits,
            prepared.memory,
            time.monotonic() + self.timeout_seconds,
            end,
        )
        self._start(operation, POINT_TO_POINT)
        return operation

    # -- the end ------------------------------------------------------------------

    def fail(self, error: FabricError) -> None:
        """End the group with ``error``, unless it has ended."""
        with self._lock:
            if self.error is not None or self._closed:
                return
            self.error = error
            running = list(self._running)
            senders, receivers = self._ends()
        self._failed.set()
        for operation in running:
            operation.fail(error)
        for sender in senders:
            sender.close(at_once=True)
        for receiver in receivers:
            receiver.close()

    def suspect(self, error: FabricError) -> None:
        """End the group with ``error`` unless someone says in time who is to blame."""
        if not self._failed.wait(GRACE_SECONDS):
            self.fail(error)

    def heard_abort(self, rank: int, member: Member) -> None:
        """End the group because of ``rank``, as ``member`` says."""
        try:
            rank = check_rank_untrusted(rank, self.size)
        except FabricError as error:
            self.fail(error)
            return
        if rank in (-1, self.rank):
            self.fail(Aborted(f"{member.name} ended the group"))
        else:
            reason = f"is gone or silent, says {member.name}"
            self.fail(PeerLost(self.names[rank], rank, reason))

    def abort(self, reason: str = "the group was aborted here") -> None:
        """End the group at once; operations under way fail here and elsewhere."""
        self.fail(Aborted(reason))

    def close(self) -> None:
        """Finish what is queued, say goodbye, and leave no thread behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            senders, receivers = self._ends()
        self._jobs.put(None)
        ends = time.monotonic() + CLOSE_SECONDS
        self._thread.join(CLOSE_SECONDS)
        for sender in senders:
            sender.close(at_once=self.error is not None)
        for sender in senders:
            sender.join(max(0.0, ends - time.monotonic()))
        self._connector.close()
        for receiver in receivers:
            receiver.close()
        for receiver in receivers:
            receiver.join(max(0.0, ends - time.monotonic()))

    def bytes_moved(self) -> tuple[int, int]:
        """Return the bytes sent and received on connections that are open."""
        with self._lock:
            senders, receivers = self._ends()
        sent = sum(s.end.bytes_moved for s in senders if s.end is not None)
        taken = sum(r.end.bytes_moved for r in receivers if r.end is not None)
        return sent, taken

    # -- running ------------------------------------------------------------------

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._run(job)
            except FabricError as error:
                job.done(error)
            except Exception as exc:  # noqa: BLE001 - the caller's tensors are wrong
                bug = LocalProtocolError(f"{job.label}: {exc!r}")
                self.fail(bug)
                job.done(bug)
            del job  # its tensors are not ours while we wait

    def _run(self, job: Job) -> None:
        if self.error is not None:
            raise self.error
        self._sequence += 1
        ended = threading.Event()
        prepared = job.prepare()
        operation = Operation(
            job.label,
            self._sequence,
            zlib.crc32(job.label.encode()),
            prepared.program,
            prepared.waits,
            prepared.memory,
            time.monotonic() + self.timeout_seconds,
            lambda _error: ended.set(),
        )
        self._start(operation, COLLECTIVE)
        self._finish_parts(operation, prepared.program)
        if not ended.wait(max(0.0, operation.deadline - time.monotonic())):
            self._out_of_time(operation)
            ended.wait()
        self._forget(operation)
        operation.check()
        job.finish()
        job.done(None)

    def _finish_parts(self, operation: Operation, program: Program) -> None:
        step = max(1, PIECE_BYTES // operation.memory.itemsize)
        for index, op in enumerate(program):
            if op.do is not Do.FINISH:
                continue
            for start in range(op.span.start, op.span.stop, step):
                stop = min(op.span.stop, start + step)
                try:
                    operation.wait(index, stop, self._patience, lambda: None)
                except FabricError:
                    return  # the operation has ended with it
                operation.memory.finish(start, stop)
                operation.advance(index, stop)

    def _out_of_time(self, operation: Operation) -> None:
        rank = operation.waits_for()
        reason = f"{operation.label} took over {self.timeout_seconds:g} s"
        if rank < 0:
            self.fail(Aborted(reason))
        else:
            self.fail(PeerSilent(self.names[rank], rank, reason))
        operation.fail(self.error or Aborted(reason))

    def _start(self, operation: Operation, channel: str) -> None:
        with self._lock:
            self._running.add(operation)
            error = self.error
        if error is not None:
            operation.fail(error)
            return
        operation.end_if_empty()
        # what arrives first: a small send may end the peer's part before ours begins
        for index, op in enumerate(operation.program):
            if op.do in (Do.RECEIVE, Do.REDUCE):
                self._receiver(op.peer, channel).post(operation, index)
        for index, op in enumerate(operation.program):
            if op.do is Do.SEND:
                self._sender(op.peer, channel).post(operation, index)

    def _forget(self, operation: Operation) -> None:
        with self._lock:
            self._running.discard(operation)

    def _ends(self) -> tuple[list[Sender], list[Receiver]]:
        return list(self._senders.values()), list(self._receivers.values())

    def _sender(self, peer: int, channel: str) -> Sender:
        key = (peer, channel)
        with self._lock:
            if key not in self._senders:
                sender = self._senders[key] = Sender(
                    self,
                    Member(peer, self.names[peer]),
                    lambda: self._connector.dial(peer, channel),
                    self._patience,
                )
                sender.start()
            return self._senders[key]

    def _receiver(self, peer: int, channel: str) -> Receiver:
        key = (peer, channel)
        with self._lock:
            if key not in self._receivers:
                receiver = self._receivers[key] = Receiver(
                    self,
                    Member(peer, self.names[peer]),
                    lambda: self._connector.accept(peer, channel),
                    self._patience,
                    by_tag=channel == POINT_TO_POINT,
                )
                receiver.start()
            return self._receivers[key]


def one_way(do: Do, peer: int, size: int) -> tuple[Program, Waits]:
    """Return the program that sends or receives ``size`` elements."""
    if not size:
        return (), ()
    program = (Op(do, peer, Span(0, size)),)
    return program, waits_of(program)
