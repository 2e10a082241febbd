"""The jobs of this peer: submit, take part, follow, stop.

Watches the replicated specs; each job that is not over gets a :class:`JobTask`, as
even a member without the means to work may be asked to witness. Messages of peers are
decoded here and handed to the task of their job.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from fabric.core.errors import (
    ConfigError,
    FabricError,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.ids import JobId, PeerId, short
from fabric.core.signing import Signer
from fabric.core.telemetry import PROTOCOL_ERRORS, Counters
from fabric.jobs.admission import check_means, fits
from fabric.jobs.config import JobsConfig
from fabric.jobs.event_log import (
    SIDE_CODEC,
    EventsReply,
    EventsRequest,
    JobEvent,
    Stopped,
    StopRequest,
    last_event,
)
from fabric.jobs.job_service import METHOD, JobTask
from fabric.jobs.messages import CODEC, Nack, Setting, job_of
from fabric.jobs.ports import HotStates, JobStore, MemberFacts, Members, OnCheckpoint
from fabric.jobs.promises import RECORD
from fabric.jobs.retirement_service import (
    is_known_over,
    keep_retiring,
    keep_tidying,
)
from fabric.jobs.runner import RunnerFactory
from fabric.jobs.runner_service import Context, RunnerHost
from fabric.jobs.seat import Seat
from fabric.jobs.spec import CODEC as SPEC_CODEC
from fabric.jobs.spec import JobSpec, check_spec, job_id
from fabric.jobs.states import JobStatus, Pause, is_over
from fabric.jobs.submission import read_spec_untrusted, sign_spec
from fabric.jobs.views import JobView, view_of_seat, view_of_status
from fabric.net.rpc_api import Rpc

__all__ = ["JobView", "JobsService"]

logger = logging.getLogger(__name__)

METHOD_EVENTS = "jobs.events"
METHOD_STOP = "jobs.stop"


def _broke(peer: PeerId) -> Callable[[Seat, float], None]:
    return lambda seat, now: seat.connection_broke(peer, now)


class JobsService:
    """All jobs of one daemon.

    Args:
        config: Bounds.
        signer: This peer's identity.
        rpc: Calls to peers; our methods are registered on it.
        store: Replicated state and promises.
        runners: A factory per kind this peer can run.
        members: Who is in the mesh.
        scratch_root: Parent of each job's scratch directory.
        on_checkpoint: Takes a finished checkpoint.
        hot: States that outlive workers; None: nobody keeps any.
        counters: Where faults are counted.
        clock: Seconds since 1970, for event times.
    """

    def __init__(
        self,
        config: JobsConfig,
        *,
        signer: Signer,
        rpc: Rpc,
        store: JobStore,
        runners: Mapping[str, RunnerFactory],
        members: Members,
        scratch_root: Path,
        on_checkpoint: OnCheckpoint,
        hot: HotStates | None = None,
        counters: Counters,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._signer, self._rpc = config, signer, rpc
        self._store, self._runners, self._members = store, runners, members
        self._scratch_root, self._on_checkpoint = scratch_root, on_checkpoint
        self._counters, self._clock, self._hot = counters, clock, hot
        self._me = signer.peer_id
        self._tasks: dict[JobId, JobTask] = {}
        self._left: set[JobId] = set()
        self._refused: set[JobId] = set()
        """Specs that nobody can run; read once."""
        self._wake = trio.Event()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; started once our RPC methods answer."""
        self._rpc.register_async(METHOD, self._on_message)
        self._rpc.register_async(METHOD_STOP, self._on_stop)
        self._rpc.register(METHOD_EVENTS, self._on_events)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._watch_connections)
            self._refresh(nursery)
            kept = self._store, self._tasks, self._config
            nursery.start_soon(keep_retiring, *kept)
            nursery.start_soon(keep_tidying, *kept, self._scratch_root)
            task_status.started()
            while True:
                with trio.move_on_after(self._config.refresh_seconds):
                    await self._wake.wait()
                self._wake = trio.Event()
                self._refresh(nursery)
                await self._inform()

    async def _watch(self) -> None:
        while True:
            await self._store.changed()
            self._wake.set()

    async def _watch_connections(self) -> None:
        """Hint to every seat whose connection broke."""
        with self._rpc.lost() as lost:
            async for peer in lost:
                for task in [t for t in self._tasks.values() if t.serves]:
                    with contextlib.suppress(Unavailable):
                        await task.order(_broke(peer))

    # -- which jobs run here

    def _refresh(self, nursery: trio.Nursery) -> None:
        """Start a task for every job that is not over."""
        specs = self._store.specs()
        self._refused &= specs.keys()
        for job, raw in specs.items():
            if job in self._tasks or job in self._refused:
                continue
            if is_known_over(self._store, job):
                continue
            running = sum(not task.ended for task in self._tasks.values())
            if running >= self._config.max_jobs:
                return
            try:
                spec = read_spec_untrusted(job, raw)
            except RemoteProtocolError as exc:
                self._refused.add(job)
                self._counters.add(PROTOCOL_ERRORS, label="jobs")
                logger.warning("jobs.refused job=%s reason=%s", job[:8], exc.reason)
                continue
            task = self._open(job, spec)
            nursery.start_soon(task.run)

    def _open(self, job: JobId, spec: JobSpec) -> JobTask:
        raw = self._store.promise(job)
        seat = Seat(
            job,
            spec,
            self._signer,
            record=RECORD.decode_untrusted(raw) if raw is not None else None,
            now=trio.current_time(),
            seed=spec.train.seed,
        )
        scratch = self._scratch_root / job
        factory = self._runners.get(spec.kind)

        def make_host(task: JobTask) -> RunnerHost:
            assert factory is not None
            scratch.mkdir(parents=True, exist_ok=True)
            context = Context(job, spec, self._me, scratch)
            return RunnerHost(factory, context, task.emit)

        task = JobTask(
            seat,
            make_host if factory is not None else None,
            rpc=self._rpc,
            store=self._store,
            scratch=scratch,
            on_checkpoint=self._on_checkpoint,
            hot=self._hot,
            config=self._config,
            wall_clock=self._clock,
            counters=self._counters,
        )
        members = self._members()
        seat.set_members(members)
        seat.set_joining(
            self._eligible(spec, members),
            self._store.coordinator(job),
            trio.current_time(),
        )
        self._tasks[job] = task
        return task

    async def _inform(self) -> None:
        """Tell every seat what the replicated state says."""
        members = self._members()
        for job, task in list(self._tasks.items()):
            if task.ended or not task.serves:  # all others would wait for it
                continue
            status, hint = self._store.status(job), self._store.coordinator(job)
            settings = self._store.settings(job, task.seat.spec)
            joins = job not in self._left and self._eligible(task.seat.spec, members)

            def act(
                seat: Seat,
                now: float,
                status: JobStatus | None = status,
                hint: PeerId | None = hint,
                joins: bool = joins,
                settings: tuple[Setting, ...] = settings,
            ) -> None:
                seat.set_members(members)
                seat.set_settings(settings)
                seat.set_joining(joins, hint, now)
                if status is not None:
                    seat.learn_status(status)

            try:
                await task.order(act)
            except Unavailable:
                continue

    def _eligible(self, spec: JobSpec, members: Mapping[PeerId, MemberFacts]) -> bool:
        mine = members.get(self._me)
        return spec.kind in self._runners and mine is not None and fits(spec, mine)

    # -- verbs

    async def submit(self, spec: JobSpec) -> JobId:
        """Publish ``spec`` under our name and return its id.

        Raises:
            ConfigError: the spec breaks a rule, or nobody here runs its kind.
            ResourceExhausted: the mesh lacks peers that fit; says what is missing.
        """
        check_spec(spec)
        if spec.kind not in self._runners:
            reason = f"this peer cannot run {spec.kind} jobs"
            raise ConfigError(
                reason, next_step=f"pip install 'peerfabric[{spec.kind}]'"
            )
        check_means(spec, self._members())
        ours = sign_spec(spec, self._signer, secrets.token_hex(16))
        job = job_id(ours)
        await self._store.put_spec(job, SPEC_CODEC.encode(ours))
        self._wake.set()
        return job

    async def stop(self, job: JobId) -> None:
        """Cancel ``job`` everywhere.

        Raises:
            ConfigError: no such job.
            Unavailable: its coordinator cannot be reached.
        """
        if self._past(job) is not None:
            return
        task = self._task(job)
        if await self._stop_here(task):
            return
        coordinator = task.seat.committed.coordinator
        request = SIDE_CODEC.encode(StopRequest(job))
        with trio.fail_after(task.seat.spec.fault.patience_seconds * 2):
            raw = await self._rpc.call(coordinator, METHOD_STOP, request)
        reply = SIDE_CODEC.decode_untrusted(raw)
        if not isinstance(reply, Stopped) or not reply.ok:
            raise Unavailable(
                f"{short(coordinator)} does not coordinate this job any more",
                next_step="try again in a few seconds",
            )

    async def leave(self, job: JobId) -> None:
        """Take no part in ``job`` from the next round on; the others go on."""
        self._left.add(job)
        await self._task(job).order(lambda seat, now: seat.leave(now))

    async def events(self, job: JobId, since: int = 0) -> list[JobEvent]:
        """Return events after number ``since``, the coordinator's where it answers.

        Of a job that ended before this daemon started, its end alone is known.
        """
        if (past := self._past(job)) is not None:
            end = last_event(past, self._clock())
            return [end] if end.seq > since else []
        task = self._task(job)
        coordinator = task.seat.committed.coordinator
        if coordinator == self._me:
            return task.log.since(since)
        try:
            with trio.fail_after(task.seat.spec.fault.patience_seconds / 2):
                request = SIDE_CODEC.encode(EventsRequest(job, since))
                raw = await self._rpc.call(coordinator, METHOD_EVENTS, request)
            reply = SIDE_CODEC.decode_untrusted(raw)
        except (FabricError, trio.TooSlowError):
            return []  # a successor will answer, from its own log
        return list(reply.events) if isinstance(reply, EventsReply) else []

    def jobs(self) -> list[JobView]:
        """Return every job known here."""
        views = []
        for job, raw in self._store.specs().items():
            task = self._tasks.get(job)
            if task is not None:
                fault = task.fault.reason if task.fault is not None else ""
                views.append(view_of_seat(task.seat, trio.current_time(), fault))
                continue
            status = self._store.status(job)
            try:
                spec = read_spec_untrusted(job, raw)
            except RemoteProtocolError:
                continue
            views.append(view_of_status(job, spec, status))
        return views

    def seat(self, job: JobId) -> Seat | None:
        """Return our seat in a job that is not over, to be read."""
        task = self._tasks.get(job)
        return None if task is None or task.ended else task.seat

    def num_running(self) -> int:
        """Return in how many running jobs this peer takes part."""
        seats = (task.seat for task in self._tasks.values() if not task.ended)
        return sum(
            not seat.over and self._me in seat.committed.participants for seat in seats
        )

    def why(self, job: JobId) -> Pause | None:
        """Return why ``job`` makes no progress as seen from here, or None."""
        if self._past(job) is not None:
            return None
        task = self._task(job)
        if task.fault is not None:
            return Pause(task.fault.code, task.fault.reason, task.fault.next_step)
        return task.seat.pause(trio.current_time())

    def _past(self, job: JobId) -> JobStatus | None:
        """Return how ``job`` ended, if it did so before this daemon started."""
        status = self._store.status(job) if job not in self._tasks else None
        return status if status is not None and is_over(status.state) else None

    def _task(self, job: JobId) -> JobTask:
        task = self._tasks.get(job)
        if task is None:
            raise ConfigError(f"no job {job[:12]}", next_step="fabric jobs lists them")
        return task

    async def _stop_here(self, task: JobTask) -> bool:
        stopped: list[bool] = []
        await task.order(lambda seat, now: stopped.append(seat.stop(now)))
        return stopped[0] if stopped else task.seat.over

    # -- doors

    async def _on_message(self, sender: PeerId, raw: bytes) -> bytes:
        message = CODEC.decode_untrusted(raw)
        task = self._tasks.get(job_of(message))
        if task is None:
            self._wake.set()
            return CODEC.encode(Nack(0, None, "E_UNKNOWN_JOB", "no such job here yet"))
        return CODEC.encode(await task.ask(sender, message))

    async def _on_stop(self, sender: PeerId, raw: bytes) -> bytes:
        request = SIDE_CODEC.decode_untrusted(raw)
        task = (
            self._tasks.get(request.job) if isinstance(request, StopRequest) else None
        )
        ok = task is not None and await self._stop_here(task)
        return SIDE_CODEC.encode(Stopped(ok))

    def _on_events(self, sender: PeerId, raw: bytes) -> bytes:
        request = SIDE_CODEC.decode_untrusted(raw)
        if not isinstance(request, EventsRequest):
            raise RemoteProtocolError("not an events request")
        task = self._tasks.get(request.job)
        found = task.log.since(request.since) if task is not None else []
        return SIDE_CODEC.encode(EventsReply(tuple(found)))
