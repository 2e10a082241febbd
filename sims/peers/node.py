"""A simulated peer: the shell around the production cores of one store.

What :mod:`crdt_store.service` does with trio, disk and sockets, this does with events:
sign, mark on disk, commit after the batch time, apply, push; take in what comes through
the one door; expire once per poll.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from crdt_store.clock import MAX_FUTURE_SECONDS, RESERVE_SECONDS, wall_seconds
from crdt_store.config import StoreConfig
from crdt_store.entry import Entry
from crdt_store.grants import Mesh, is_authority_key
from crdt_store.memory_storage import MemoryStorage
from crdt_store.outcome import Outcome
from crdt_store.push_queue import PushQueue
from crdt_store.replica import MAX_REDEMPTION_AGE_SECONDS, Replica
from crdt_store.schedule import SyncSchedule
from fabric.core.ids import PeerId
from fabric.core.signing import Signer
from sims.peers.fork import fork_replica, fork_storage
from sims.peers.library import Library

EPOCH = 1_700_000_000.0
"""Wall seconds at which every run begins."""


class Node:
    """One peer.

    Args:
        number: Its number in the network.
        signer: Its identity.
        mesh: What mesh it is a member of.
        config: Of its store.
        library: Shared by all.
        rng: Its choices.

    Attributes:
        replica: The state, while it runs.
        storage: Its disk: survives crashes.
        skew: Seconds by which its clock is ahead.
        tick_at: Wall seconds of the next thing to expire or to judge again.
        up_since: When it last started.
        version: Grows with every change of what it offers.
        barred: Whether all who run know that it was revoked, and refuse it.
        outcomes: What became of the entries offered to it.
    """

    __slots__ = (
        "barred",
        "config",
        "generation",
        "last_sync",
        "library",
        "mesh",
        "number",
        "outcomes",
        "peer",
        "poll_phase",
        "pushes",
        "replica",
        "rng",
        "schedule",
        "signer",
        "skew",
        "storage",
        "tick_at",
        "uncommitted",
        "up_since",
        "version",
    )

    def __init__(
        self,
        number: int,
        signer: Signer,
        mesh: Mesh,
        config: StoreConfig,
        library: Library,
        rng: random.Random,
    ) -> None:
        self.number = number
        self.signer = signer
        self.peer: PeerId = signer.peer_id
        self.mesh = mesh
        self.config = config
        self.library = library
        self.rng = rng
        self.storage = MemoryStorage()
        self.skew = 0.0
        self.version = 0
        self.tick_at = 0.0
        self.up_since = 0.0
        self.generation = 0
        self.barred = False
        self.outcomes: Counter[Outcome] = Counter()
        self.poll_phase = rng.random() * config.connect_poll_seconds
        self.uncommitted: list[Entry] = []
        self.last_sync: float | None = None
        self.replica = self._empty_replica()
        self.pushes = PushQueue(config)
        self.schedule = SyncSchedule(config, rng, 0.0, 1)

    def _empty_replica(self) -> Replica:
        return Replica(
            self.mesh,
            self.signer.public_key,
            clock_mark=self.storage.high_water(),
            max_entries=self.config.max_entries,
            max_entries_per_author=self.config.max_entries_per_author,
        )

    def wall(self, now: float) -> float:
        """Return what its clock shows at virtual ``now``."""
        return EPOCH + now + self.skew

    # --- starting

    def start(self, now: float, num_members: int) -> None:
        """Come up with what the disk holds, as after a crash."""
        self.replica = self._empty_replica()
        entries, malformed = self.library.decode_untrusted(self.storage.load())
        assert not malformed, "our own disk"
        self.replica.offer_batch(entries, self.wall(now))
        self.replica.take_changes()
        self.attach(now, num_members)

    def start_as(self, original: Node, now: float, num_members: int) -> None:
        """Come up with the state and disk of ``original``, which must not change."""
        self.storage = fork_storage(original.storage)
        self.replica = fork_replica(original.replica, self.signer.public_key)
        self.attach(now, num_members)

    def attach(self, now: float, num_members: int) -> None:
        """Come up with the replica as it is."""
        mark = self.replica.clock.last
        self.last_sync = wall_seconds(mark) - RESERVE_SECONDS if mark else None
        self.pushes = PushQueue(self.config)
        self.schedule = SyncSchedule(self.config, self.rng, now, num_members)
        self.uncommitted.clear()
        self.generation += 1
        self.up_since = now
        self.version += 1
        self.tick_at = self.replica.next_tick()

    # --- our own writes

    def sign(self, key: str, value: bytes, ttl_seconds: int, now: float) -> str:
        """Sign a write and queue it for the disk; return why not, or "".

        See ``Store.put``; :meth:`commit` is due one batch time later.
        """
        wall = self.wall(now)
        entry = self.replica.sign(self.signer, key, value, ttl_seconds, wall)
        if reason := self.replica.authority.refusal(entry):
            return reason
        if entry.seconds > wall + MAX_FUTURE_SECONDS:
            return "clock"
        mark = self.replica.clock.mark_to_save(wall)
        if mark is not None:
            self.storage.save_high_water(mark)
            self.replica.clock.saved(mark)
        self.uncommitted.append(self.library.signed(entry))
        return ""

    def commit(self, now: float) -> list[Entry]:
        """Put the queued writes on disk; return those that are now acknowledged."""
        waiting, self.uncommitted = self.uncommitted, []
        self.flush(waiting)
        for entry in waiting:
            if self.replica.commit_own(entry, self.wall(now)):
                self.pushes.add(entry, now)
        self.version += 1
        self.tick_at = self.replica.next_tick()
        return waiting

    def flush(self, own: Iterable[Entry] = ()) -> None:
        """Write to disk what it does not hold yet."""
        changes = self.replica.take_changes()
        upserts = {**changes.upserts, **{entry.slot: entry for entry in own}}
        if upserts or changes.deletes:
            self.storage.write(tuple(upserts.values()), tuple(changes.deletes))

    # --- the door

    def take_in_untrusted(
        self, raws: Iterable[bytes], now: float, *, live: bool
    ) -> Counter[Outcome]:
        """Offer entries to the replica.

        Args:
            raws: As received.
            now: Virtual seconds.
            live: They come by gossip or from no member: old redemptions are refused.
        """
        entries, malformed = self.library.decode_untrusted(raws)
        entries.sort(key=lambda e: (not is_authority_key(e.key), e.key))
        fresh_after = None
        if live and self.last_sync is not None:
            fresh_after = self.last_sync - MAX_REDEMPTION_AGE_SECONDS
        outcomes = self.replica.offer_batch(
            entries, self.wall(now), fresh_after=fresh_after
        )
        if malformed:
            outcomes[Outcome.MALFORMED] += malformed
        self.outcomes.update(outcomes)
        if outcomes[Outcome.ACCEPTED]:
            self.version += 1
            self.flush()
        if outcomes[Outcome.ACCEPTED] or outcomes[Outcome.HELD]:
            self.tick_at = self.replica.next_tick()
        return outcomes

    def expire(self, now: float) -> None:
        """Drop what is too old and judge what is now due, if anything is."""
        if self.wall(now) < self.tick_at:
            return
        self.replica.tick(self.wall(now))
        self.tick_at = self.replica.next_tick()
        if self.replica.take_touched():
            self.version += 1
            self.flush()
