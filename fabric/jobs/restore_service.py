"""The shell of :mod:`fabric.jobs.restoration`: looks for checkpoints, brings one."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fabric.core.errors import FabricError
from fabric.jobs.ports import HotStates, JobStore
from fabric.jobs.restoration import Restored
from fabric.jobs.seat import Seat
from fabric.jobs.states import Pause

log = logging.getLogger(__name__)


class Restorer:
    """Gets the lost state of one job.

    Args:
        seat: Told what there is, by its owner alone.
        hot: Knows and brings checkpoints; None: nobody does.
        store: Knows how far the job was.
        order: Has something done to the seat by its owner.
    """

    def __init__(
        self,
        seat: Seat,
        hot: HotStates | None,
        store: JobStore,
        order: Callable[[Callable[[Seat, float], None]], Awaitable[None]],
    ) -> None:
        self._seat, self._hot, self._store, self._order = seat, hot, store, order

    def look(self) -> None:
        """Tell the seat which checkpoint there is, if it could come to need one."""
        seat = self._seat
        if self._hot is None or seat.holds_state or seat.over:
            return
        participants = seat.committed.participants
        status = self._store.status(seat.job)
        seat.restoration.know(
            self._hot.checkpoint(seat.job, seat.spec, participants),
            0 if status is None else status.round,
        )

    async def run(self) -> None:
        """Bring the newest checkpoint here and tell the seat how that ended."""
        seat = self._seat
        assert self._hot is not None  # else the seat knows of no checkpoint
        participants = seat.committed.participants
        outcome: Restored | Pause
        try:
            outcome = await self._hot.restore(seat.job, seat.spec, participants)
        except FabricError as exc:
            log.warning("job.not_restored job=%s %r", seat.job[:8], exc)
            next_step = exc.next_step or "bring back a peer that holds the checkpoint"
            outcome = Pause(exc.code, exc.reason[:500], next_step[:500])
        await self._order(lambda seat, now: seat.restoration.ended(outcome))
