"""What each request of the control API does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import trio

from dht.progress import Progress
from fabric.app import control_messages as m
from fabric.app.boards import board_view, edit_board
from fabric.app.checkpoint_flow import content_root
from fabric.app.content_messages import ContentRow
from fabric.app.control_net import findings, ping
from fabric.app.explain import explain_peer, peer_rows
from fabric.app.plan_links import plan_links
from fabric.app.plan_messages import PlanLinks
from fabric.app.session import ENDED, Session
from fabric.app.trust import change_trust
from fabric.core.errors import ConfigError, Unavailable
from fabric.core.ids import BlobId, JobId, PeerId
from fabric.jobs.service import JobView
from fabric.jobs.spec import CODEC

if TYPE_CHECKING:
    from fabric.app.node import Node

Results = AsyncGenerator[msgspec.Struct, None]
LOCAL_SECONDS = 3600.0
"""Longest time to copy local content; a person interrupts earlier."""
EVENT_POLL_SECONDS = 0.2
"""How soon a follower sees an event; the coordinator keeps them."""


class ControlVerbs:
    """Answers requests on behalf of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def answer(self, request: m.Request) -> Results:
        """Yield the results of ``request``.

        Raises:
            FabricError: why it is refused.
        """
        match request:
            case m.JobEvents():
                many = self._events(request)
            case m.Ping():
                many = ping(self._session, request)
            case m.Doctor():
                many = findings(self._session, request.peer)
            case m.Jobs() | m.ContentList() | m.Trust():
                many = self._rows(request)
            case _:
                yield await self._one(request)
                return
        async with aclosing(many):
            async for result in many:
                yield result

    async def _rows(self, request: m.Jobs | m.ContentList | m.Trust) -> Results:
        if isinstance(request, m.Jobs):
            known = self._session.checkpoints.replication.copies()
            for view in self._session.jobs.jobs():
                root = BlobId(str(view.facts.get("checkpoint", "")))
                if root in known:
                    held, wanted = known[root]
                    view.facts[m.COPIES_FACT] = f"{held}/{wanted}"
                yield job_row(view, self._session.store.presence.absence)
            return
        if isinstance(request, m.Trust):
            for row in self._session.store.admin.rows():
                yield row
            return
        copies = self._session.checkpoints.replication.copies()
        for stat in await trio.to_thread.run_sync(self._session.blobs.ls):
            held, wanted = copies.get(stat.root, (-1, 0))
            yield ContentRow(stat.root, stat.name, stat.size, stat.pinned, held, wanted)

    async def _one(self, request: m.Request) -> msgspec.Struct:
        match request:
            case m.Status():
                return self._status()
            case m.Board() | m.BoardEdit():
                job = self._job(request.job)
                if isinstance(request, m.BoardEdit):
                    await edit_board(self._session, job, request)
                return board_view(self._session, job)
            case m.ContentProgress(root):
                return self._session.content.progress(content_root(root)) or Progress()
            case m.CheckpointFetch(root, path, only):
                flow = self._session.checkpoints.flow
                return await flow.fetch(root, Path(path), only)
            case m.Why():
                return m.Lines(await self._why(request.subject))
            case PlanLinks():
                return await plan_links(
                    self._session,
                    request,
                    self._job(request.job) if request.job else None,
                )
            case m.RootSigned():
                admin = self._session.store.admin
                return m.Lines((admin.root, *(i.hex() for i in admin.root_signed())))
            case _:
                return m.Line(await self._do(request))

    @property
    def _session(self) -> Session:
        return self._node.require_session()

    async def _do(self, request: m.Request) -> str:
        """Do what changes something; return one string."""
        match request:
            case m.MeshInit(name, root, grant):
                return await self._node.mesh_init(name, root, grant)
            case m.Invite(role, ttl_seconds, uses):
                return await self._node.invite(role, ttl_seconds, uses)
            case m.Join(token):
                return await self._node.join(token)
            case m.Leave():
                await self._node.leave()
            case m.Down(drain):
                await self._down(drain=drain)
            case _:
                return await self._do_in_mesh(self._session, request)
        return "ok"

    async def _do_in_mesh(self, session: Session, request: m.Request) -> str:
        match request:
            case m.Grant() | m.Revoke() | m.AddAuthority():
                await change_trust(session, request)
            case m.Submit(spec):
                return await session.checkpoints.submit(CODEC.decode_untrusted(spec))
            case m.ContentPin(root, pinned):
                blobs = session.blobs
                change = blobs.pin if pinned else blobs.unpin
                await trio.to_thread.run_sync(change, content_root(root))
            case m.StopJob(job):
                await session.jobs.stop(self._job(job))
            case m.Serve():
                return await session.serving.serve(
                    content_root(request.checkpoint),
                    stages=request.stages,
                    port=request.port,
                    model_name=request.model_name,
                )
            case m.ContentAdd(path):
                return await self._content_add(session, Path(path))
            case m.ContentGet(root, path):
                await self._content_get(session, root, Path(path))
            case m.Partition(peers):
                await session.partition(frozenset(map(PeerId, peers)))
            case _:
                raise ConfigError(f"no verb for {type(request).__name__}")
        return "ok"

    def _status(self) -> m.StatusView:
        node = self._node
        session = node.session
        state: Literal["no mesh", "joining", "member"] = "no mesh"
        if session is not None:
            state = "joining" if node.joining else "member"
        role = session and session.store.authority.role_of(session.own)
        return m.StatusView(
            peer=node.signer.peer_id,
            name=node.config.display_name,
            version=version("peerfabric"),
            state=state,
            mesh=session.mesh.id if session else "",
            mesh_name=session.mesh.name if session else "",
            role=str(role or ""),
            addrs=session.host.addrs() if session else (),
            peers=peer_rows(session) if session else (),
            counters=node.counters.snapshot(),
            state_hash=session.store.state_hash() if session else "",
            entries=session.store.num_entries() if session else 0,
        )

    def _job(self, start: str) -> JobId:
        """Return the job whose id starts with ``start``."""
        found = [v.job for v in self._session.jobs.jobs() if v.job.startswith(start)]
        if len(found) != 1:
            raise Unavailable(
                f"{len(found)} jobs have an id that starts with {start!r}",
                code="E_NO_JOB",
                next_step="`fabric jobs` lists them",
            )
        return found[0]

    async def _events(self, request: m.JobEvents) -> Results:
        job, since = self._job(request.job), request.since
        while True:
            over = self._view(job).state in ENDED
            for event in await self._session.jobs.events(job, since):
                since = event.seq
                yield m.EventView(
                    event.seq, event.time, event.kind, event.peer, event.facts
                )
            if over or not request.follow:
                return
            await trio.sleep(EVENT_POLL_SECONDS)

    def _view(self, job: JobId) -> JobView:
        return next(v for v in self._session.jobs.jobs() if v.job == job)

    async def _why(self, subject: str) -> tuple[str, ...]:
        session = self._session
        try:
            job = self._job(subject)
        except Unavailable:
            return await explain_peer(session, session.resolve(subject))
        view = self._view(job)
        pause = session.jobs.why(job)
        lines = [f"job {view.name} is {view.state}, round {view.round}/{view.rounds}"]
        if pause is not None:
            lines += [f"{pause.code}: {pause.reason}", f"next: {pause.next_step}"]
        elif view.reason:
            lines.append(view.reason)
        lines.append(f"coordinator {view.coordinator}, generation {view.counter}")
        absent = job_row(view, session.store.presence.absence).absent
        for peer in view.participants:
            why = f" ({absent[peer]})" if peer in absent else ""
            lines.append(f"participant {peer}{why}")
        return tuple(lines)

    async def _content_add(self, session: Session, path: Path) -> str:
        root = await trio.to_thread.run_sync(session.blobs.add_pinned, path)
        await session.content.provide(root)
        return root

    async def _content_get(self, session: Session, root: str, path: Path) -> None:
        blob = content_root(root)
        with session.blobs.keeps.held(blob):
            with trio.fail_after(LOCAL_SECONDS):
                await session.content.fetch(blob)
            await trio.to_thread.run_sync(session.blobs.export, blob, path)

    async def _down(self, *, drain: bool) -> None:
        if drain:
            await self._node.leave_jobs()
        self._node.ended.set()


def job_row(view: JobView, absence: Callable[[PeerId], str]) -> m.JobRow:
    """Return a job as a row of ``fabric jobs``; ``absence`` says why a peer is away."""
    over = view.state in ENDED
    named = () if over else (PeerId(view.coordinator), *view.participants)
    absent = {peer: word for peer in named if peer and (word := absence(peer))}
    reason = view.reason
    if (why := absent.get(PeerId(view.coordinator))) and not reason:
        reason = f"its coordinator is away ({why})"
    return m.JobRow(
        job=view.job,
        name=view.name,
        kind=view.kind,
        state=view.state,
        reason=reason,
        coordinator=view.coordinator or "",
        generation=view.counter,
        participants=view.participants,
        round=view.round,
        rounds=view.rounds,
        facts=dict(view.facts),
        absent={str(peer): why for peer, why in absent.items()},
    )
