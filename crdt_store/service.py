"""The store as the rest of the project sees it: ``async with open_store(...)``.

A thin shell: the replica decides, this file moves bytes between it and disk, gossip,
RPC and watchers.

    put -> sign -> mark on disk? -> commit -> apply -> push, wake watches
    push, sync, admission -> the one door -> apply -> wake watches, disk soon
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from crdt_store.administration import Administration
from crdt_store.clock import MAX_FUTURE_SECONDS
from crdt_store.commit_service import Committer, Disk
from crdt_store.config import StoreConfig
from crdt_store.documents.service import Documents
from crdt_store.entry import Entry
from crdt_store.gossip_service import Gossip, topic_of
from crdt_store.grants import GRANT_PREFIX, REDEMPTION_PREFIX, Mesh
from crdt_store.intake_service import Intake
from crdt_store.job_views import Assignments, Jobs
from crdt_store.link_views import Links
from crdt_store.liveness.service import make_liveness
from crdt_store.membership import Membership
from crdt_store.presence import Presence
from crdt_store.promise_service import Promises
from crdt_store.replica import Replica
from crdt_store.storage import SqliteStorage, Storage, lock_data_folder
from crdt_store.sync_service import Reconciler, SyncReport
from crdt_store.views import Heads, Members, Placements, Verdicts
from crdt_store.watch_service import Watchers
from fabric.core.errors import (
    ConfigError,
    FabricError,
    IntegrityError,
    RemoteProtocolError,
    RemoteRefused,
)
from fabric.core.ids import PeerId
from fabric.core.signing import Signer
from fabric.core.telemetry import DROPPED, Counters
from fabric.net.ports import Broadcast
from fabric.net.rpc_api import Rpc
from fabric.net.tasks import collapse_group

_LOG = logging.getLogger(__name__)
_MAX_LATER = 256
"""Writes nobody waits for (verdicts); beyond it they are dropped and counted."""


class Store:
    """The replicated state of one peer in one mesh; made by :func:`open_store`.

    Attributes:
        mesh: Name and root key.
        authority: Roles and membership at the present moment.
        admin: Invites, grants and revocations.
        liveness: Who is there now; from probes, never stored.
        members, jobs, assignments, heads, placements, links, verdicts: Typed tables.
        documents: Written by several, such as a job's board.
        promises: Of the job protocol; on this disk alone.
        presence: Who is there and, if not, why not.
    """

    def __init__(
        self,
        config: StoreConfig,
        replica: Replica,
        storage: Storage,
        signer: Signer,
        rpc: Rpc,
        broadcast: Broadcast,
        clock: Callable[[], float],
        counters: Counters,
        rng: random.Random,
        incarnation: int = 0,
    ) -> None:
        self.mesh = replica.mesh
        self.authority = Membership(replica.authority, clock)
        self._config = config
        self._replica = replica
        self._storage = storage
        self._signer = signer
        self._clock = clock
        self._counters = counters
        self._watchers = Watchers()
        self._disk = Disk(storage)
        self._committer = Committer(
            replica,
            storage,
            self._disk,
            batch_seconds=config.commit_batch_seconds,
            on_committed=self._committed,
        )
        self._intake = Intake(replica, clock, counters, self._after_change)
        self._gossip = Gossip(
            config, self.mesh.id, broadcast, self._intake.pushed_untrusted, counters
        )
        self._pushes = broadcast.subscribe(topic_of(self.mesh.id))
        self._reconciler = Reconciler(
            config,
            replica,
            rpc,
            self._intake.synced_untrusted,
            counters,
            rng,
            num_members=lambda: len(self.authority.members()),
            on_synced=self._intake.synced,
        )
        self.promises = Promises(storage, self._disk)
        self._places = trio.CapacityLimiter(config.max_pending_puts)
        self._later, self._to_put = trio.open_memory_channel[tuple[str, bytes, int]](
            _MAX_LATER
        )
        self.admin = Administration(
            self.mesh, replica.slots, replica.authority, signer, self.put, clock
        )
        self._make_views()
        self.liveness = make_liveness(
            config.liveness,
            signer,
            self.mesh.id,
            rpc,
            self._present_members,
            self._watchers,
            counters,
            rng,
            incarnation,
        )
        self.presence = Presence(self.authority, self.members.says, self.liveness.state)
        shy = self.members, self.assignments, self.placements, self.links, self.verdicts
        for view in shy:
            view.absence = self.presence.absence

    def _present_members(self) -> frozenset[PeerId]:
        found = {entry.peer for entry in self._replica.slots.under("m/")}
        return (self.authority.members() & found) - self.members.left()

    def _make_views(self) -> None:
        slots, me = self._replica.slots, self._signer.peer_id
        put, watch = self.put, self._watchers.watch
        self.members = Members(slots, put, watch, me)
        self.jobs = Jobs(slots, put, watch, me)
        self.assignments = Assignments(slots, put, watch, me)
        self.heads = Heads(slots, put, watch, me)
        self.placements = Placements(slots, put, watch, me)
        self.links = Links(slots, put, watch, me)
        self.documents = Documents(
            slots, put, watch, me, clock=self._clock, counters=self._counters
        )
        self.verdicts = Verdicts(
            slots,
            put,
            watch,
            me,
            put_soon=self._put_soon,
            revocation=self.authority.revocation,
        )

    # --- our own writes

    async def put(self, key: str, value: bytes, ttl_seconds: int) -> Entry:
        """Return our entry for ``key`` once it is on disk; it then spreads by itself.

        After cancellation it may have been written.

        Args:
            key: Of a table this peer's role may write.
            value: At most 4 KiB.
            ttl_seconds: 0 = for ever; stretched to outlast the entry it replaces.

        Raises:
            ValueError: key, value or ttl out of bounds.
            RemoteRefused: the mesh does not let this peer write there.
            ConfigError: this machine's clock was set back by more than a minute.
            ResourceExhausted: the disk is full; nothing was written.
        """
        async with self._places:
            now = self._clock()
            entry = self._replica.sign(self._signer, key, value, ttl_seconds, now)
            self._check_own(entry, now)
            mark = self._replica.clock.mark_to_save(now)
            if mark is not None:
                await self._disk.run(self._storage.save_high_water, mark)
                self._replica.clock.saved(mark)
            await self._committer.commit(entry)
        return entry

    def _check_own(self, entry: Entry, now: float) -> None:
        if reason := self._replica.authority.refusal(entry):
            decision = self.authority.membership(self._signer.peer_id)
            raise RemoteRefused(
                decision.reason or f"this peer may not write {entry.key!r} ({reason})",
                code=decision.code or "E_NOT_AUTHORISED",
                next_step=decision.next_step or "ask an owner for another role",
            )
        if entry.seconds > now + MAX_FUTURE_SECONDS:
            raise ConfigError(
                f"this clock is {entry.seconds - now:.0f} s behind what this peer "
                "already wrote; others would not take its entries",
                code="E_CLOCK",
                next_step="set the clock (NTP), or wait",
            )

    def _committed(self, entry: Entry) -> None:
        if self._replica.commit_own(entry, self._clock()):
            self._gossip.push(entry)
            self._after_change()

    def _put_soon(self, key: str, value: bytes, ttl_seconds: int) -> None:
        try:
            self._later.send_nowait((key, value, ttl_seconds))
        except trio.WouldBlock:
            self._counters.add(DROPPED, label="store_put_soon")

    async def _run_later(self) -> None:
        authority = self._watchers.watch("0", "inv")
        async for key, value, ttl_seconds in self._to_put:
            while not self.authority.membership(self._signer.peer_id).allowed:
                await authority.changed()  # a newcomer judges who admits it
            try:
                await self.put(key, value, ttl_seconds)
            except FabricError as exc:
                self._counters.add(DROPPED, label="store_put_soon")
                _LOG.warning("store.put_failed code=%s reason=%s", exc.code, exc.reason)

    # --- the doors

    def ingest_untrusted(self, raw: bytes, source: PeerId) -> bool:
        """Take in one entry that ``source`` shows now; return whether it is new."""
        return self._intake.shown_untrusted([raw], source) == 1

    def ingest_shown_untrusted(self, raws: Sequence[bytes]) -> None:
        """Take in what a peer shows at admission; redemptions must be fresh."""
        self._intake.shown_untrusted(raws)

    def ingest_authority_untrusted(self, raws: Sequence[bytes]) -> int:
        """Take in the authority entries of an admission reply; return how many are new.

        For the joiner: old redemptions are part of the mesh's state.
        """
        return self._intake.bulk_untrusted(raws)

    def _after_change(self) -> None:
        touched = self._replica.take_touched()
        if touched:
            self._watchers.touched(touched)
            self._committer.wake()

    # --- reconciliation

    async def sync_with(self, peer: PeerId) -> SyncReport:
        """Reconcile with ``peer`` now (see :meth:`Reconciler.sync_with`)."""
        return await self._reconciler.sync_with(peer)

    def state_hash(self) -> str:
        """Return a hash that is equal on replicas that offer the same entries."""
        return self._replica.state_hash()

    def num_entries(self) -> int:
        """Return how many entries are held."""
        return len(self._replica.slots)

    # --- authority

    def authority_entries(self) -> list[bytes]:
        """Return all authority entries, for the admission reply."""
        return self._replica.authority_entries()

    def credential(self) -> list[bytes]:
        """Return the entries that make us a member, to show at admission."""
        me = self._signer.peer_id
        slots = self._replica.slots
        redeemed = [
            entry
            for entry in slots.under(REDEMPTION_PREFIX)
            if entry.key.endswith(f"/{me}")
        ]
        return [entry.raw for entry in [*slots.at(GRANT_PREFIX + me), *redeemed]]

    # --- tasks

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Commit, push, receive, reconcile and expire until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._committer.run)
            nursery.start_soon(self._gossip.run_push)
            nursery.start_soon(self._gossip.run_receive, self._pushes)
            nursery.start_soon(self._reconciler.run)
            nursery.start_soon(self._run_later)
            nursery.start_soon(self.liveness.run)
            nursery.start_soon(self._run_expiry)
            task_status.started()

    async def _run_expiry(self) -> None:
        while True:
            self._replica.tick(self._clock())
            self._after_change()
            await trio.sleep(self._config.connect_poll_seconds)


@asynccontextmanager
async def open_store(
    config: StoreConfig,
    directory: Path,
    signer: Signer,
    mesh: Mesh,
    rpc: Rpc,
    broadcast: Broadcast,
    clock: Callable[[], float],
    counters: Counters,
    *,
    storage: Storage | None = None,
    rng: random.Random | None = None,
    incarnation: int = 0,
) -> AsyncIterator[Store]:
    """Open the store in ``directory`` and run it until the block is left.

    Leaving commits what is in memory.

    Args:
        config: Periods and bounds.
        directory: Made if missing; locked against a second process ("store.lock").
        signer: This peer.
        mesh: What mesh it is a member of, or wants to join.
        rpc: Reconciliation; ``store.sync`` is registered on it.
        broadcast: Gossip.
        clock: Wall seconds.
        counters: Of the process.
        storage: Instead of SQLite in ``directory`` (then unused).
        rng: Chooses reconciliation partners and whom to probe.
        incarnation: Starts of this peer in this mesh, this one included.

    Raises:
        ConfigError: the directory is in use or not writable.
        IntegrityError: the database is damaged.
    """
    with ExitStack() as stack:
        if storage is None:
            stack.enter_context(lock_data_folder(directory, "store.lock"))
            storage = await trio.to_thread.run_sync(
                SqliteStorage, directory / "store.sqlite3"
            )
            stack.callback(storage.close)
        replica = await _restore(config, storage, signer, mesh, clock())
        store = Store(
            config,
            replica,
            storage,
            signer,
            rpc,
            broadcast,
            clock,
            counters,
            rng or random.Random(signer.public_key),
            incarnation,
        )
        with collapse_group():
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                yield store
                nursery.cancel_scope.cancel()


async def _restore(
    config: StoreConfig, storage: Storage, signer: Signer, mesh: Mesh, now: float
) -> Replica:
    disk = Disk(storage)
    mark = await disk.run(storage.high_water)
    raws = await disk.run(storage.load)
    replica = Replica(
        mesh,
        signer.public_key,
        clock_mark=mark,
        max_entries=config.max_entries,
        max_entries_per_author=config.max_entries_per_author,
    )
    try:
        replica.restore(raws, now)
    except RemoteProtocolError as exc:
        raise IntegrityError(
            f"the store holds an entry that does not decode: {exc.reason}",
            code="E_STORE_CORRUPT",
            next_step="move the store away and start again: it comes back from peers",
        ) from exc
    return replica
