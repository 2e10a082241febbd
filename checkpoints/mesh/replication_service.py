"""Keeps as many copies of each checkpoint as its head asks for, and no more.

Every peer that may hold a copy asks the others who does, decides by the same rules
(``replicas.py``) and acts for itself alone: it fetches, or it drops. Nobody commands.

Order of removal: a step that newer ones push out is no head any more on the peer that
removes it (``Heads.newest``), and only then its blocks go. A crash in between leaves
blocks without a head, which the next look removes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from checkpoints.mesh.config import ReplicationConfig
from checkpoints.mesh.erasure_service import Erasure, Newest
from checkpoints.mesh.messages import (
    CODEC,
    MAX_ASKED,
    METHOD_ASK,
    ReplicaAsk,
    ReplicaState,
)
from checkpoints.mesh.placement import Domains
from checkpoints.mesh.replicas import ReplicaTable, Want
from checkpoints.mesh.wants import wants_of
from crdt_store.views import Heads
from dht.blobs import BlobStore
from dht.service import ContentService
from fabric.core.errors import (
    FabricError,
    IntegrityError,
    RemoteProtocolError,
    ResourceExhausted,
)
from fabric.core.ids import BlobId, PeerId, short
from fabric.core.telemetry import Counters
from fabric.net.rpc_api import Rpc

log = logging.getLogger(__name__)

COPIED = "checkpoint_copies_total"
"""Copies made here, and those that failed or were dropped, by label."""
RETIRED = "retired"


@dataclass(frozen=True)
class ReplicationPorts:
    """What keeping copies needs of the node.

    Attributes:
        rpc: Small questions.
        heads: Which checkpoints there are.
        blobs: Content on disk.
        content: Fetches.
        domains: Who is there, ourselves included, and where.
        in_use: Roots that a job needs now: they are not removed.
    """

    rpc: Rpc
    heads: Heads
    blobs: BlobStore
    content: ContentService
    domains: Callable[[], Domains]
    in_use: Callable[[], Collection[str]]


class Replication:
    """The copies of checkpoints that are this peer's to keep.

    Args:
        config: Periods.
        own: This peer.
        ports: The node.
        counters: Where copies are counted.
    """

    def __init__(
        self,
        config: ReplicationConfig,
        own: PeerId,
        ports: ReplicationPorts,
        counters: Counters,
    ) -> None:
        self._config, self._own, self._ports = config, own, ports
        self._counters = counters
        self._table: ReplicaTable | None = None
        self._refused: dict[BlobId, float] = {}
        """Until when a copy is not tried again."""
        self._publishing: Counter[str] = Counter()
        self._removing = trio.Lock()
        self._wake = trio.Event()
        self._erasure = Erasure(
            own,
            ports.heads,
            ports.blobs,
            ports.content,
            config.fetch_timeout_seconds,
        )

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer others, copy and remove until cancelled."""
        now = trio.current_time()
        self._table = ReplicaTable(self._own, now, self._config.lost_after_seconds)
        self._ports.rpc.register_async(METHOD_ASK, self._on_ask)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                try:
                    busy = await self._turn(self._table)
                except (FabricError, OSError) as exc:
                    log.warning("replication.turn %r", exc)
                    busy = False
                with trio.move_on_after(0 if busy else self._config.period_seconds):
                    await self._wake.wait()
                self._wake = trio.Event()
                await trio.sleep(min(0.05, self._config.period_seconds / 10))

    async def _watch(self) -> None:
        watch = self._ports.heads.watch()
        while True:
            await watch.changed()
            self.wake()

    def wake(self) -> None:
        """Look again soon."""
        self._wake.set()

    @asynccontextmanager
    async def publishing(self, run: str) -> AsyncIterator[None]:
        """Remove nothing of ``run`` while inside: a step is about to get its head."""
        self._publishing[run] += 1
        try:
            async with self._removing:  # what began before ends before
                pass
            yield
        finally:
            self._publishing[run] -= 1

    def copies(self) -> Mapping[BlobId, tuple[int, int]]:
        """Return how many copies there are and should be, as far as known here."""
        return self._table.copies(trio.current_time()) if self._table else {}

    # -- one look

    async def _turn(self, table: ReplicaTable) -> bool:
        """Look once and act; return whether there may be more to do at once."""
        now = trio.current_time()
        table.set_wants(wants_of(self._newest()), now)
        table.set_members(self._ports.domains())
        await self._remove_retired()
        await self._note_own(table)
        await self._ask_others(table)
        if not self._config.enabled:
            return False
        now = trio.current_time()
        for want in table.to_drop(now):
            await self._remove(want.root, want.run, "spare")
        copies = table.to_copy(now)
        for want in copies[:1]:
            await self._copy(want, table.holders(want.root, now))
        return await self._code(table) or bool(copies)

    def _newest(self) -> Newest:
        heads = self._ports.heads
        return {run: heads.newest(run) for run in heads.runs()}

    async def _code(self, table: ReplicaTable) -> bool:
        """Work on erasure-coded checkpoints; return whether there may be more to do."""
        now = trio.current_time()
        for want in table.to_remake(now)[:1]:
            lost = frozenset(p for p in want.pieces if not table.holders(p, now))
            await self._erasure.remake(want, lost)
        for want in table.to_restore(now)[:1]:
            await self._erasure.restore(want)
        return await self._erasure.announce(self._newest())

    async def _remove_retired(self) -> None:
        """Remove what is kept for runs that have newer checkpoints now."""
        kept = await trio.to_thread.run_sync(self._ports.blobs.keeps.kept)
        for run, roots in kept.items():
            for root in roots:
                # Heads are read after the marks, and again for each root: what was
                # marked a moment ago is protected, or has its head by now.
                if self._is_retired(root, run):
                    await self._remove(root, run, RETIRED)

    def _is_retired(self, root: BlobId, run: str) -> bool:
        newest = self._ports.heads.newest(run)
        wanted = {want.root for want in wants_of({run: newest})}
        return bool(newest) and root not in wanted

    async def _remove(self, root: BlobId, run: str, why: str) -> None:
        """Keep ``root`` no longer for ``run``; its blocks go if nobody wants them."""
        async with self._removing:
            if self._publishing[run] or root in self._ports.in_use():
                return
            if why == RETIRED and not self._is_retired(root, run):
                return  # published again while we waited
            if await trio.to_thread.run_sync(self._ports.blobs.remove, root, run):
                self._ports.content.withdraw(root)
                self._counters.add(COPIED, label=why)
                log.info("replication.removed root=%s why=%s", root[:12], why)

    async def _note_own(self, table: ReplicaTable) -> None:
        roots = table.wanted()
        state = await self._state_of(roots)
        for at in state.holds:  # fetched by a person, or before a crash
            await trio.to_thread.run_sync(self._keep, roots[at], table)
        self._take(table, self._own, roots, state)

    def _keep(self, root: BlobId, table: ReplicaTable) -> None:
        run = table.run_of(root)
        keeps = self._ports.blobs.keeps
        if run not in keeps.owners(root):
            keeps.keep(root, run)

    async def _ask_others(self, table: ReplicaTable) -> None:
        async with trio.open_nursery() as nursery:
            for peer, roots in table.asks().items():
                for at in range(0, len(roots), MAX_ASKED):
                    part = roots[at : at + MAX_ASKED]
                    nursery.start_soon(self._ask, table, peer, part)

    async def _ask(
        self, table: ReplicaTable, peer: PeerId, roots: tuple[BlobId, ...]
    ) -> None:
        try:
            with trio.fail_after(self._config.call_timeout_seconds):
                request = CODEC.encode(ReplicaAsk(roots))
                raw = await self._ports.rpc.call(peer, METHOD_ASK, request)
            answer = CODEC.decode_untrusted(raw)
            if not isinstance(answer, ReplicaState):
                raise RemoteProtocolError("no ReplicaState")
            self._take(table, peer, roots, answer)
        except (FabricError, trio.TooSlowError):
            table.silent(peer, roots)

    def _take(
        self,
        table: ReplicaTable,
        peer: PeerId,
        roots: tuple[BlobId, ...],
        state: ReplicaState,
    ) -> None:
        holds = [roots[at] for at in state.holds if at < len(roots)]
        refuses = [roots[at] for at in state.refuses if at < len(roots)]
        table.answered(peer, roots, holds, refuses, state.room, trio.current_time())

    async def _on_ask(self, sender: PeerId, raw: bytes) -> bytes:
        message = CODEC.decode_untrusted(raw)
        if not isinstance(message, ReplicaAsk):
            raise RemoteProtocolError(f"{type(message).__name__} instead of ReplicaAsk")
        roots = tuple(BlobId(root) for root in message.roots)
        return CODEC.encode(await self._state_of(roots))

    async def _state_of(self, roots: tuple[BlobId, ...]) -> ReplicaState:
        now = trio.current_time()
        return await trio.to_thread.run_sync(self._state, roots, now)

    def _state(self, roots: tuple[BlobId, ...], now: float) -> ReplicaState:
        blobs = self._ports.blobs
        places = dict(enumerate(roots))
        return ReplicaState(
            holds=tuple(at for at, root in places.items() if blobs.has(root)),
            refuses=tuple(
                at for at, root in places.items() if self._refused.get(root, 0) > now
            ),
            room=blobs.room.free() if self._config.enabled else 0,
        )

    async def _copy(self, want: Want, holders: Collection[PeerId]) -> None:
        blobs, content = self._ports.blobs, self._ports.content
        try:
            with trio.fail_after(self._config.fetch_timeout_seconds):
                await trio.to_thread.run_sync(blobs.make_room, want.size)
                # marked first: a part that a crash leaves goes with the step's head
                await trio.to_thread.run_sync(blobs.keeps.keep, want.root, want.run)
                await content.fetch(want.root, sorted(holders))
        except (ResourceExhausted, IntegrityError, OSError) as exc:
            await trio.to_thread.run_sync(blobs.remove, want.root, want.run)
            self._refuse(want, exc, self._config.retry_seconds)
        except (FabricError, trio.TooSlowError) as exc:  # the holders left: look again
            self._refuse(want, exc, self._config.period_seconds)
        else:
            self._counters.add(COPIED, label="made")
            log.info(
                "replication.copied root=%s from=%s", want.root[:12], _names(holders)
            )

    def _refuse(self, want: Want, why: Exception, seconds: float) -> None:
        self._refused[want.root] = trio.current_time() + seconds
        self._counters.add(COPIED, label="failed")
        log.warning("replication.refused root=%s %r", want.root[:12], why)


def _names(peers: Collection[PeerId]) -> str:
    return ",".join(short(peer) for peer in sorted(peers))
