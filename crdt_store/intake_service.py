"""Every way in from outside, counted; in chunks, so that signatures never hog the loop.

Whether old redemptions are welcome depends on the way (see
:meth:`Replica.ingest_untrusted`): what a peer shows live must be fresh, what a member
brings in a reconciliation, or a mesh answers to its newcomer, may be old.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from crdt_store.clock import RESERVE_SECONDS, wall_seconds
from crdt_store.entry import Entry
from crdt_store.grants import decode_batch_untrusted
from crdt_store.outcome import Outcome
from crdt_store.replica import MAX_REDEMPTION_AGE_SECONDS, Replica
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import Counters

_LOG = logging.getLogger(__name__)
_CHUNK = 32
"""Entries judged between two checkpoints: 4 ms of signatures."""

REFUSED = "store_refused_total"
"""Entries refused at the door, labelled by reason."""
ACCEPTED = "store_accepted_total"
"""Entries of others taken in."""


class Intake:
    """Offers entries from outside to the replica.

    Args:
        replica: Judges them.
        clock: Wall seconds.
        counters: Of the process.
        after_change: Called after each chunk.
    """

    def __init__(
        self,
        replica: Replica,
        clock: Callable[[], float],
        counters: Counters,
        after_change: Callable[[], None],
    ) -> None:
        self._replica = replica
        self._clock = clock
        self._counters = counters
        self._after_change = after_change
        # the mark on disk says when we last ran, which is when we last were in sync
        mark = replica.clock.last
        self._last_sync = wall_seconds(mark) - RESERVE_SECONDS if mark else None

    def synced(self) -> None:
        """Note that a reconciliation just ended well."""
        self._last_sync = self._clock()

    def shown_untrusted(
        self, raws: Sequence[bytes], source: PeerId | None = None
    ) -> int:
        """Take in what a peer shows now; return how many entries are new."""
        entries, malformed = decode_batch_untrusted(raws)
        return self._offer(entries, malformed, source, self._fresh_after())

    def bulk_untrusted(self, raws: Sequence[bytes]) -> int:
        """Take in the state of a mesh we join; return how many entries are new."""
        entries, malformed = decode_batch_untrusted(raws)
        return self._offer(entries, malformed, None, None)

    async def pushed_untrusted(self, raws: Sequence[bytes], source: PeerId) -> None:
        """Take in gossip."""
        await self._in_chunks(raws, source, self._fresh_after())

    async def synced_untrusted(self, raws: Sequence[bytes], source: PeerId) -> int:
        """Take in the entries of a reconciliation; return how many are new."""
        member = self._replica.authority.membership(source, self._clock()).allowed
        fresh_after = None if member else self._fresh_after()
        return await self._in_chunks(raws, source, fresh_after)

    def _fresh_after(self) -> float | None:
        if self._last_sync is None:
            return None  # a newcomer knows no time to compare with
        return self._last_sync - MAX_REDEMPTION_AGE_SECONDS

    async def _in_chunks(
        self, raws: Sequence[bytes], source: PeerId, fresh_after: float | None
    ) -> int:
        entries, malformed = decode_batch_untrusted(raws)
        new = self._offer([], malformed, source, fresh_after)
        for at in range(0, len(entries), _CHUNK):
            new += self._offer(entries[at : at + _CHUNK], 0, source, fresh_after)
            await trio.lowlevel.checkpoint()
        return new

    def _offer(
        self,
        entries: Sequence[Entry],
        malformed: int,
        source: PeerId | None,
        fresh_after: float | None,
    ) -> int:
        outcomes = self._replica.offer_batch(
            entries, self._clock(), fresh_after=fresh_after
        )
        outcomes[Outcome.MALFORMED] += malformed
        self._count(outcomes, source)
        self._after_change()
        return outcomes[Outcome.ACCEPTED]

    def _count(self, outcomes: Counter[Outcome], source: PeerId | None) -> None:
        for outcome, number in outcomes.items():
            if outcome is Outcome.ACCEPTED:
                self._counters.add(ACCEPTED, number)
            elif number and not outcome.harmless:
                self._counters.add(REFUSED, number, label=outcome.value)
                who = short(source) if source else "-"
                _LOG.debug("store.refused peer=%s %s=%d", who, outcome.value, number)
