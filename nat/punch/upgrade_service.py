"""Moves peers from a relay to a direct path when that is due; see ``upgrade.py``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from nat.punch.config import PunchConfig
from nat.punch.facts import IMPOSSIBLE
from nat.punch.upgrade import UpgradeCore

Upgrade = Callable[[PeerId], Awaitable[None]]
"""Returns when the peer's RPC is on a better path; raises FabricError why it is not."""

_POLL_SECONDS = 1.0
_UPGRADE_SECONDS = 20.0


class UpgradeService:
    """Run :meth:`run` in a task.

    Args:
        config: Waits between failures.
        relayed: Returns the peers whose RPC is on a relay; asked once a second.
        upgrade: Moves one of them.
    """

    def __init__(
        self,
        config: PunchConfig,
        relayed: Callable[[], Iterable[PeerId]],
        upgrade: Upgrade,
    ) -> None:
        self._core = UpgradeCore(config.retry_seconds)
        self._relayed = relayed
        self._upgrade = upgrade
        self._wake = trio.Event()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Upgrade until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._core.update(frozenset(self._relayed()))
                now = trio.current_time()
                for peer in self._core.start(now):
                    nursery.start_soon(self._try, peer)
                self._wake = trio.Event()
                with trio.move_on_after(_POLL_SECONDS):
                    await self._wake.wait()

    def check_now(self) -> None:
        """Look at once: a peer just came onto a relay."""
        self._wake.set()

    def network_changed(self) -> None:
        """Try everyone again."""
        self._core.network_changed()
        self._wake.set()

    def reason(self, peer: PeerId) -> str:
        """Return why ``peer`` is still on a relay, or nothing when not tried yet."""
        return self._core.reason(peer)

    async def _try(self, peer: PeerId) -> None:
        failure, may_pass = "", True
        try:
            with trio.fail_after(_UPGRADE_SECONDS):
                await self._upgrade(peer)
        except trio.TooSlowError:
            failure = f"the upgrade took longer than {_UPGRADE_SECONDS:g} s"
        except FabricError as exc:
            failure, may_pass = exc.reason or exc.code, exc.code != IMPOSSIBLE
        now = trio.current_time()
        self._core.ended(peer, now, failure=failure, may_pass=may_pass)
        self._wake.set()
