"""The trio shell of one RPC connection: a reader, a writer and a timer.

The reader runs inline handlers itself, so a call costs no task. A caller is parked on
its own task and woken by the reader; it has no cancel scope of ours, because the timer
expires calls. The writer sends whatever was queued since its last send, in one piece.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container

import outcome
import trio

from fabric.core.errors import (
    FabricError,
    PeerTimeout,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId
from fabric.core.telemetry import RECEIVED_BYTES, SENT_BYTES, Counters
from fabric.net.data_config import RpcConfig
from fabric.net.ports import PathKind
from fabric.net.rpc_core import (
    CancelReceived,
    RefusalReceived,
    RequestReceived,
    ResponseReceived,
    RpcCore,
)
from fabric.net.tasks import collapse_group

RECEIVE_BYTES = 1 << 18
"""Read at once: many small frames, or one of the larger ones."""
SEND_BYTES = 1 << 18
"""Sent at once; a peer that takes less than this in ``dead_after_seconds`` stalls."""

Serve = Callable[["RpcConnection", RequestReceived], None]
"""Answers a request of the peer now, or starts a task that will."""


class RpcConnection:
    """One connection with ``peer``, running while :meth:`run` does.

    Args:
        peer: Who is at the other end; authenticated by whoever made the stream.
        stream: Closed when :meth:`run` ends.
        origin: Who dialled, and the kind of path: they decide which of two stays.
        config: Limits and times.
        serve: Called inline for each request.
        counters: Receives byte counts under the label "rpc".
        background: Methods whose calls do not count as use.

    Attributes:
        retired: Both sides agreed to do without it: nobody misses it when it ends.
    """

    def __init__(
        self,
        peer: PeerId,
        stream: trio.abc.Stream,
        origin: tuple[PeerId, PathKind],
        config: RpcConfig,
        serve: Serve,
        counters: Counters,
        background: Container[str] = frozenset(),
    ) -> None:
        self.peer = peer
        self.initiator, self.kind = origin
        self.retired = False
        self._background = background
        self._used_at = trio.current_time()
        # calls that run: ours under their number, the peer's under its negative
        self._in_use: set[int] = set()
        self._stream = stream
        self._config = config
        self._serve = serve
        self._counters = counters
        self._core = RpcCore(config, trio.current_time())
        self._callers: dict[int, trio.lowlevel.Task] = {}
        self._handlers: dict[int, trio.CancelScope] = {}
        self._writer = trio.lowlevel.ParkingLot()
        self._writer_parked = False
        self._timer = trio.lowlevel.ParkingLot()
        self._armed = 0.0
        self._nursery: trio.Nursery | None = None
        self._ended: FabricError | None = None
        self._on_proof: Callable[[], None] | None = None

    @property
    def rtt_seconds(self) -> float | None:
        """Smoothed round-trip time, or None when unknown."""
        return self._core.rtt_seconds

    @property
    def is_draining(self) -> bool:
        """Whether another connection replaces this one."""
        return self._core.is_draining

    @property
    def silent_seconds(self) -> float:
        """How long nothing has arrived."""
        return self._core.silent_seconds(trio.current_time())

    @property
    def idle_seconds(self) -> float:
        """How long nobody used it, for anything but background; 0 while calls run."""
        if self._in_use:
            return 0.0
        return trio.current_time() - self._used_at

    async def run(self) -> FabricError:
        """Serve until the connection ends; return why.

        Every waiting caller then has an ``Unavailable``.
        """
        try:
            with collapse_group():
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    if self._ended is not None:
                        nursery.cancel_scope.cancel()
                    for loop in (self._read, self._write, self._tick):
                        nursery.start_soon(self._run_until_ended, loop)
        finally:
            if self._ended is None:
                self._ended = Unavailable("connection closed")
            callers, self._callers = self._callers, {}
            for task in callers.values():
                trio.lowlevel.reschedule(task, outcome.Error(self._broken()))
            await trio.aclose_forcefully(self._stream)
        return self._ended

    def end(self, error: FabricError) -> None:
        """Close soon, for the reason ``error``."""
        if self._ended is None:
            self._ended = error
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def doubt(self, on_proof: Callable[[], None] | None = None) -> None:
        """Ask the peer whether it is there; without an answer this ends soon.

        Args:
            on_proof: Called, from the reader, when anything has arrived since.
        """
        self._on_proof = on_proof or self._on_proof
        self._core.doubt(trio.current_time())
        self._timer.unpark()

    def drain(self) -> None:
        """Finish what is open, then close: another connection takes over."""
        self._core.drain()

    async def call(self, method: str, request: bytes) -> bytes:
        """Return the peer's answer.

        On cancellation the peer is told, and its late answer is ignored.

        Raises:
            Unavailable: the connection broke, or the deadline passed (PeerTimeout).
            RemoteRefused: the peer declined.
            ResourceExhausted: too much already waits for this peer.
        """
        if self._ended is not None:
            raise self._broken()
        now = trio.current_time()
        deadline = trio.current_effective_deadline()
        if deadline == float("inf"):
            deadline = now + self._config.call_timeout_seconds
        elif deadline < now:  # -inf in a cancelled scope
            await trio.lowlevel.checkpoint_if_cancelled()
        call = self._core.request(method, request, deadline, now)
        self._callers[call] = trio.lowlevel.current_task()
        self._begin_use(call, method)
        self._wake_writer()
        if deadline < self._armed:
            self._timer.unpark()

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._callers.pop(call, None)
            self._end_use(call)
            self._core.cancel(call)
            self._wake_writer()
            return trio.lowlevel.Abort.SUCCEEDED

        answer: bytes = await trio.lowlevel.wait_task_rescheduled(abort)
        return answer

    def respond(self, call: int, payload: bytes) -> None:
        """Answer the peer's call; a peer that does not take answers is disconnected."""
        self._end_use(-call)
        try:
            self._core.respond(call, payload)
        except ResourceExhausted as exc:
            self.end(exc)
        self._wake_writer()

    def refuse(self, call: int, error: FabricError) -> None:
        """Decline the peer's call."""
        self._end_use(-call)
        try:
            self._core.refuse(call, error)
        except ResourceExhausted as exc:
            self.end(exc)
        self._wake_writer()

    def start_handler(
        self,
        request: RequestReceived,
        answer: Callable[[RequestReceived], Awaitable[None]],
    ) -> None:
        """Run ``answer`` in a task that ends with the call's deadline or cancellation.

        Raises:
            ResourceExhausted: too many of the peer's calls run already.
        """
        if len(self._handlers) >= self._config.max_async_handlers:
            raise ResourceExhausted(
                f"{len(self._handlers)} calls of this peer run already",
                code="E_BUSY",
                next_step="retry later, with fewer calls at once",
            )
        assert self._nursery is not None
        scope = trio.CancelScope(deadline=trio.current_time() + request.seconds_left)
        self._handlers[request.id] = scope
        self._nursery.start_soon(self._run_handler, scope, request, answer)

    async def _run_handler(
        self,
        scope: trio.CancelScope,
        request: RequestReceived,
        answer: Callable[[RequestReceived], Awaitable[None]],
    ) -> None:
        try:
            with scope:
                await answer(request)
        finally:
            if self._handlers.get(request.id) is scope:
                del self._handlers[request.id]
        if scope.cancelled_caught:
            self.refuse(request.id, PeerTimeout("deadline passed before the answer"))

    async def _run_until_ended(self, loop: Callable[[], Awaitable[None]]) -> None:
        try:
            await loop()
        except FabricError as exc:
            self.end(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.end(Unavailable(f"connection broke: {exc.__cause__ or exc!r}"))

    async def _read(self) -> None:
        while True:
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                raise Unavailable("peer closed the connection")
            self._counters.add(RECEIVED_BYTES, len(data), label="rpc")
            events = self._core.receive(data, trio.current_time())
            self._note_proof()
            for event in events:
                match event:
                    case RequestReceived(id=call, method=method):
                        self._begin_use(-call, method)
                        self._serve(self, event)
                    case ResponseReceived(id=call, payload=payload):
                        self._wake_caller(call, outcome.Value[object](payload))
                    case RefusalReceived(id=call, error=error):
                        self._wake_caller(call, outcome.Error(error))
                    case CancelReceived(id=call):
                        self._end_use(-call)
                        if (scope := self._handlers.pop(call, None)) is not None:
                            scope.cancel()
            if self._core.has_output:
                self._wake_writer()

    def _begin_use(self, call: int, method: str) -> None:
        if method not in self._background:
            self._in_use.add(call)

    def _end_use(self, call: int) -> None:
        if call in self._in_use:
            self._in_use.discard(call)
            self._used_at = trio.current_time()

    def _note_proof(self) -> None:
        if self._on_proof is not None:
            on_proof, self._on_proof = self._on_proof, None
            on_proof()

    async def _write(self) -> None:
        while True:
            if not self._core.has_output:
                self._writer_parked = True
                await self._writer.park()
            output = self._core.take_output()
            with memoryview(output) as view:
                for at in range(0, len(output), SEND_BYTES):
                    part = view[at : at + SEND_BYTES]
                    await self._stream.send_all(part)
                    self._core.on_sent(len(part))
            self._counters.add(SENT_BYTES, len(output), label="rpc")

    async def _tick(self) -> None:
        while True:
            self._armed = self._core.next_timeout()
            with trio.move_on_at(self._armed):
                await self._timer.park()
            now = trio.current_time()
            for call in self._core.on_timeout(now):
                self._wake_caller(
                    call, outcome.Error(PeerTimeout("peer did not answer in time"))
                )
            if self._core.is_drained(now):
                by = "agreement" if self.retired else "another connection's arrival"
                raise Unavailable(f"closed by {by}")
            if self._core.has_output:
                self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writer_parked:
            self._writer_parked = False
            self._writer.unpark()

    def _wake_caller(
        self, call: int, result: outcome.Value[object] | outcome.Error
    ) -> None:
        task = self._callers.pop(call, None)
        self._end_use(call)
        if task is not None:
            trio.lowlevel.reschedule(task, result)

    def _broken(self) -> Unavailable:
        """Return a fresh error: one exception must not be raised in two tasks."""
        cause = self._ended
        if cause is None:
            return Unavailable("connection closed")
        return Unavailable(f"connection with {self.peer}: {cause.reason}")
