"""One job on this peer: the task that owns its seat, its runner and its event log.

All that concerns the seat passes through one bounded inbox, so it has one writer.
After each input: poll the seat, perform the effects in order (a promise is on disk
before anything else), then let the answers out and start the sends.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from fabric.core.errors import (
    FabricError,
    NoRoute,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import PROTOCOL_ERRORS, Counters
from fabric.jobs.config import JobsConfig
from fabric.jobs.effects import (
    Apply,
    Decide,
    Diverged,
    Effect,
    Ended,
    Persist,
    Publish,
    Recorded,
    Restore,
    Retire,
    SaveState,
)
from fabric.jobs.event_log import EventLog
from fabric.jobs.messages import CODEC, JobMessage
from fabric.jobs.ports import HotStates, JobStore, OnCheckpoint
from fabric.jobs.promises import RECORD
from fabric.jobs.publisher_service import Publisher
from fabric.jobs.restore_service import Restorer
from fabric.jobs.runner import RunnerEvent, RunnerFailed
from fabric.jobs.runner_service import Command, RunnerHost, SaveTo
from fabric.jobs.seat import Seat
from fabric.net.rpc_api import Rpc

logger = logging.getLogger(__name__)

METHOD = "jobs.message"
INTEGRITY_ERRORS = "integrity_errors_total"
"""Participants that held another state than the rest, labelled by package."""

INBOX = 256
"""Inputs waiting for the seat. Senders wait for room; the seat takes microseconds."""


AT_ONCE_SECONDS = 0.5
"""A dial that fails within this was refused: nothing was waited for."""


def _exists(path: Path) -> bool:
    return path.exists()  # one look: no thread is worth it


@dataclass
class Asked:
    """A peer's message and where its answer goes."""

    sender: PeerId
    message: JobMessage
    answered: trio.Event = field(default_factory=trio.Event)
    answer: JobMessage | None = None


@dataclass(frozen=True)
class Replied:
    """The end of one of our calls.

    Attributes:
        peer: Whom we called.
        request: What we sent.
        reply: The answer, or None when it failed.
        refused_from: When the call started, if it was refused at once.
    """

    peer: PeerId
    request: JobMessage
    reply: JobMessage | None
    refused_from: float | None = None


@dataclass(frozen=True)
class Order:
    """Something our own daemon wants of the seat."""

    act: Callable[[Seat, float], None]
    done: trio.Event


Input = Asked | Replied | Order | RunnerEvent


class JobTask:
    """Run one job on this peer until it ended and everybody was told.

    Args:
        seat: This peer's seat; nobody else touches it.
        open_host: Makes the runner's host, given where its events go; None when this
            peer cannot run this kind.
        rpc: Calls to peers.
        store: Where promises, statuses and assignments go.
        scratch: Directory of this job on this peer.
        on_checkpoint: Takes a written checkpoint.
        hot: States that outlive workers; None: nobody keeps any.
        config: Bounds.
        wall_clock: Seconds since 1970, for event times.
        counters: Where faults are counted.
    """

    def __init__(
        self,
        seat: Seat,
        make_host: Callable[[JobTask], RunnerHost] | None,
        *,
        rpc: Rpc,
        store: JobStore,
        scratch: Path,
        on_checkpoint: OnCheckpoint,
        hot: HotStates | None,
        config: JobsConfig,
        wall_clock: Callable[[], float],
        counters: Counters,
    ) -> None:
        self.seat = seat
        self.log = EventLog(config.log_events)
        self.serves, self.ended = False, False
        self.fault: FabricError | None = None
        self._host = make_host(self) if make_host is not None else None
        self._rpc, self._store, self._scratch = rpc, store, scratch
        self._on_checkpoint, self._config = on_checkpoint, config
        self._hot = hot
        self._wall_clock, self._counters = wall_clock, counters
        self._send_input, self._inputs = trio.open_memory_channel[Input](INBOX)
        self._waiting: list[Asked | Order] = []
        self._publisher = Publisher(seat, store, config)
        self._restorer = Restorer(seat, hot, store, self.order)
        self._save_turn = trio.Lock()  # one step is written and published at a time

    # -- for others

    async def ask(self, sender: PeerId, message: JobMessage) -> JobMessage:
        """Return the answer to a peer's message."""
        if self.ended and self.seat.over:
            return self.seat.receive(sender, message, trio.current_time())
        asked = Asked(sender, message)
        await self._put(asked)
        await asked.answered.wait()
        if asked.answer is None:
            raise Unavailable("this job has stopped here")
        return asked.answer

    async def order(self, act: Callable[[Seat, float], None]) -> None:
        """Have ``act`` done to the seat by its owner."""
        if self.ended:
            return
        order = Order(act, trio.Event())
        await self._put(order)
        await order.done.wait()

    async def emit(self, event: RunnerEvent) -> None:
        """Hand an event of our runner to the seat."""
        await self._put(event)

    async def _put(self, item: Input) -> None:
        try:
            await self._send_input.send(item)
        except trio.BrokenResourceError:
            raise Unavailable("this job has stopped here") from None

    # -- the owner

    async def run(self) -> None:
        """Own the seat until the job is over and told, or our disk refuses."""
        try:
            await self._recall()
            self.serves = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._publisher.run)
                await self._serve(nursery)
                nursery.cancel_scope.cancel()
            if self._hot is not None and self.seat.over:
                await self._hot.forget(self.seat.job)
        finally:
            self.ended = True
            self._release(answer=False)
            self._drop_inputs()
            if self._host is not None:
                self._host.close()

    def _drop_inputs(self) -> None:
        while True:
            try:
                item = self._inputs.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                break
            if isinstance(item, Asked):
                item.answered.set()
            elif isinstance(item, Order):
                item.done.set()
        self._inputs.close()

    async def _serve(self, nursery: trio.Nursery) -> None:
        patience = self.seat.spec.fault.patience_seconds
        give_up = float("inf")
        while not self.seat.idle and trio.current_time() < give_up:
            if not await self._turn(nursery):
                return
            if self.seat.over:
                give_up = min(give_up, trio.current_time() + 4 * patience)
            now = trio.current_time()
            with trio.move_on_at(self.seat.next_timeout(now)):
                self._take(await self._inputs.receive())
            for _ in range(INBOX):
                try:
                    self._take(self._inputs.receive_nowait())
                except trio.WouldBlock:
                    break
        await self._turn(nursery)
        await self._publisher.write(None)

    def _take(self, item: Input) -> None:
        now = trio.current_time()
        match item:
            case Asked():
                self._take_question(item, now)
            case Replied(peer, request, None, refused_from):
                self.seat.failed(peer, request, now, refused_from)
            case Replied(peer, request, reply):
                assert reply is not None
                self.seat.replied(peer, request, reply, now)
            case Order():
                item.act(self.seat, now)
                self._waiting.append(item)
            case _:
                self._take_event(item, now)

    def _take_event(self, event: RunnerEvent, now: float) -> None:
        hot = None
        if isinstance(event, RunnerFailed) and self._hot is not None:
            hot = self._hot.newest(self.seat.job)
        self.seat.event(event, now, hot)

    async def _recall(self) -> None:
        """After a restart: get what is kept of the state before anybody asks."""
        if self._hot is not None and self.seat.resumed:
            participants = self.seat.committed.participants
            await self._hot.recall(self.seat.job, participants)

    def _take_question(self, asked: Asked, now: float) -> None:
        self._waiting.append(asked)
        try:
            asked.answer = self.seat.receive(asked.sender, asked.message, now)
        except RemoteProtocolError:
            self._counters.add(PROTOCOL_ERRORS, label="jobs")

    async def _turn(self, nursery: trio.Nursery) -> bool:
        """Poll, perform, answer, send; False when we can no longer keep promises."""
        if self._hot is not None:
            self.seat.recalled(self._hot.newest(self.seat.job))
            self._restorer.look()
        outputs = self.seat.poll(trio.current_time())
        try:
            for effect in outputs.effects:
                await self._perform(effect, nursery)
        except FabricError as exc:
            # nothing of this turn leaves: what was promised is not on disk
            logger.exception("job.stopped_here job=%s", self.seat.job[:8])
            self.fault = exc
            return False
        self._release(answer=True)
        for peer, message in outputs.sends:
            nursery.start_soon(self._call, peer, message)
        return True

    def _release(self, *, answer: bool) -> None:
        for item in self._waiting:
            if isinstance(item, Asked):
                item.answer = item.answer if answer else None
                item.answered.set()
            else:
                item.done.set()
        self._waiting.clear()

    async def _perform(self, effect: Effect, nursery: trio.Nursery) -> None:
        match effect:
            case Persist(record):
                blob = RECORD.encode(record)
                await self._store.save_promise(self.seat.job, record.promised, blob)
            case Apply(generation):
                self._command(generation, nursery)
            case Decide(decision):
                self._command(decision, nursery)
            case Retire():
                if self._host is not None:
                    self._host.close()
            case SaveState(at):
                nursery.start_soon(self._save, at, nursery)
            case Restore():
                nursery.start_soon(self._restorer.run)
            case _:
                self._note(effect)

    def _note(self, effect: Publish | Recorded | Diverged | Ended) -> None:
        match effect:
            case Publish():
                self._publisher.want(effect)
            case Recorded(kind, peer, facts):
                self._record(kind, peer, facts)
            case Diverged(num_peers):
                self._counters.add(INTEGRITY_ERRORS, num_peers, label="jobs")
            case Ended(state):
                logger.info("job.ended job=%s %s", self.seat.job[:8], state.value)

    def _command(self, command: Command, nursery: trio.Nursery) -> None:
        if self._host is None:
            kind = self.seat.spec.kind
            self._report_failure("E_NO_RUNNER", f"this peer cannot run {kind} jobs")
            return
        try:
            self._host.send(command, nursery)
        except ResourceExhausted as exc:
            self._report_failure("E_WORKER_STUCK", exc.reason)

    def _report_failure(self, code: str, reason: str) -> None:
        self._take_event(RunnerFailed(code, reason), trio.current_time())

    def _record(
        self,
        kind: str,
        peer: PeerId | None,
        facts: dict[str, str | int | float | bool],
    ) -> None:
        counter = self.seat.committed.counter
        self.log.add(counter, self._wall_clock(), kind, peer or "", facts)
        logger.info("job.%s job=%s %s", kind, self.seat.job[:8], facts)

    async def _call(self, peer: PeerId, message: JobMessage) -> None:
        reply: JobMessage | None = None
        refused_from: float | None = None
        started = trio.current_time()
        try:
            with trio.fail_after(self.seat.spec.fault.patience_seconds / 2):
                raw = await self._rpc.call(peer, METHOD, CODEC.encode(message))
            reply = CODEC.decode_untrusted(raw)
        except RemoteProtocolError:
            self._counters.add(PROTOCOL_ERRORS, label="jobs")
        except (FabricError, trio.TooSlowError) as exc:
            logger.debug("job.call peer=%s %r", short(peer), exc)
            at_once = trio.current_time() - started < AT_ONCE_SECONDS
            refused_from = started if isinstance(exc, NoRoute) and at_once else None
        await self._send_input.send(Replied(peer, message, reply, refused_from))

    # -- checkpoint

    async def _save(self, at: int, nursery: trio.Nursery) -> None:
        root, reason = "", ""
        directory = self._scratch / "checkpoints" / f"step-{at}"
        try:
            with trio.fail_after(self._config.save_timeout_seconds):
                async with self._save_turn:
                    root = await self._write(at, directory, nursery)
        except FabricError as exc:
            reason = f"{exc.code}: {exc.reason}"
        except trio.TooSlowError:
            reason = f"no checkpoint in {self._config.save_timeout_seconds:.0f} s"
        act_at = (at, root, reason)
        await self.order(lambda seat, now: seat.saved(*act_at, now))

    async def _write(self, at: int, directory: Path, nursery: trio.Nursery) -> str:
        """Write and publish the state of round ``at``; content is its only copy then.

        What a crash left is removed first: it was not announced.
        """
        if self._host is None:
            raise Unavailable("no worker of this job runs here")
        if _exists(directory):
            await trio.to_thread.run_sync(shutil.rmtree, directory, True)
        await self._host.save(SaveTo(directory, at), nursery)
        seat = self.seat
        return await self._on_checkpoint(seat.job, seat.spec, directory, at)
