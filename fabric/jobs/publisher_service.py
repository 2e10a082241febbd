"""What a job's participants write for everybody: status, assignment, and the spec anew.

Slots have a lifetime and a job may outlast it. Whoever holds a spec can publish it
again under its own name, as its hash is the job's id; so the coordinator renews it, and
no job depends on its submitter's presence. Where the coordinator is away the others
take its place, each a good while after the one before, so that few slots are written.
"""

from __future__ import annotations

import logging
from collections import deque

import trio

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from fabric.jobs.config import JobsConfig
from fabric.jobs.effects import Publish
from fabric.jobs.messages import Generation
from fabric.jobs.ports import JobStore
from fabric.jobs.seat import Seat
from fabric.jobs.spec import CODEC
from fabric.jobs.states import JobStatus
from fabric.jobs.views import is_news, status_of

logger = logging.getLogger(__name__)

_FIRST_SHARE, _LAST_SHARE = 1 / 2, 1 / 4
"""What is left of a spec's lifetime when the coordinator renews it, and the last."""


def renew_share(me: PeerId, generation: Generation, submitter: PeerId) -> float:
    """Return the share of the spec's lifetime at which we renew it; 0: never."""
    others = [p for p in generation.participants if p != generation.coordinator]
    keepers = list(dict.fromkeys([generation.coordinator, *others, submitter]))
    if me not in keepers:
        return 0.0
    later = keepers.index(me) / len(keepers)
    return _FIRST_SHARE - later * (_FIRST_SHARE - _LAST_SHARE)


class Publisher:
    """Writes the slots of one job that are this peer's to write.

    Args:
        seat: Read only.
        store: Where the slots are.
        config: Periods.
    """

    def __init__(self, seat: Seat, store: JobStore, config: JobsConfig) -> None:
        self._seat, self._store, self._config = seat, store, config
        self._published: JobStatus | None = None
        self._published_at = 0.0
        # 64: statuses are written far less often than this drains
        self._wanted: deque[Publish] = deque(maxlen=64)
        self._wake = trio.Event()

    def want(self, effect: Publish) -> None:
        """Write what ``effect`` says, soon."""
        self._wanted.append(effect)
        self._wake.set()

    async def run(self) -> None:
        """Write what is wanted at once, and look after the rest, until cancelled."""
        while True:
            with trio.move_on_after(self._config.status_period_seconds):
                await self._wake.wait()
            self._wake = trio.Event()
            while self._wanted:
                await self.write(self._wanted.popleft().generation)
            if self._seat.coordinates:
                await self.write(None)
            await self._renew()

    async def write(self, generation: Generation | None) -> None:
        """Write our status if we coordinate and it is news; ``generation`` is."""
        seat, now = self._seat, trio.current_time()
        if seat.committed.coordinator != seat.me:
            return
        status = status_of(seat, now)
        share = self._config.progress_seconds / len(seat.committed.participants)
        late = now - self._published_at >= share
        if generation is None and not is_news(status, self._published, late=late):
            return
        self._published, self._published_at = status, now
        try:
            if generation is not None:
                await self._assign(generation)
            await self._store.put_status(seat.job, status)
        except FabricError as exc:
            logger.warning("job.status job=%s %s", seat.job[:8], exc.reason)

    async def _assign(self, generation: Generation) -> None:
        await self._store.put_assignment(
            self._seat.job,
            generation.counter,
            generation.coordinator,
            len(generation.participants),
        )

    async def _renew(self) -> None:
        """Write again what would run out; the job is not over."""
        seat = self._seat
        if seat.over:
            return
        left = self._store.left(seat.job)
        share = renew_share(seat.me, seat.committed, PeerId(seat.spec.submitter))
        try:
            if left.spec < share:
                await self._store.put_spec(seat.job, CODEC.encode(seat.spec))
            if not seat.coordinates:
                return
            if left.assignment < _FIRST_SHARE and seat.committed.counter:
                await self._assign(seat.committed)
            if left.status < _FIRST_SHARE and self._published is not None:
                await self._store.put_status(seat.job, self._published, again=True)
        except FabricError as exc:
            logger.warning("job.renew job=%s %s", seat.job[:8], exc.reason)
