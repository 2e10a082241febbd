"""Whether the peer at the other end of a control connection is still there.

A connection that is silent is asked now and then. When something says that its path may
be dead, it is asked at once, and must answer within ``DOUBT_SECONDS``.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from fabric.net.yamux import YamuxSession

DOUBT_SECONDS = 2.0
"""For an answer to a ping of a connection in doubt."""


class Pulse:
    """Of one connection; :meth:`run` is its task.

    Args:
        session: Asked, and asked whether anything arrived.
        keepalive_seconds: Silence after which the peer is asked.
        dead_after_seconds: Silence after that which ends the connection.
        swept: Called each period.
        kick: Sends what the session queued.

    Attributes:
        in_doubt: Other connections with the peer are better until this one answers.
    """

    def __init__(
        self,
        session: YamuxSession,
        keepalive_seconds: float,
        dead_after_seconds: float,
        *,
        swept: Callable[[], None],
        kick: Callable[[], None],
    ) -> None:
        self.in_doubt = False
        self._session = session
        self._keepalive_seconds = keepalive_seconds
        self._dead_after_seconds = dead_after_seconds
        self._swept = swept
        self._kick = kick
        self._doubted_at = 0.0
        self._asked = trio.Event()
        self._stirred = trio.lowlevel.ParkingLot()
        self._heard = False
        self._nonce = 0

    def doubt(self) -> None:
        """Ask the peer now whether it is there."""
        if not self.in_doubt:
            self.in_doubt = True
            self._doubted_at = trio.current_time()
            self._asked.set()
            self._stirred.unpark_all()

    def on_received(self) -> None:
        """Bytes of the peer arrived."""
        self._heard = True
        self._stirred.unpark_all()

    async def run(self) -> str:
        """Return why the peer counts as gone."""
        while True:
            self._heard = False
            with trio.move_on_after(self._keepalive_seconds):
                await self._asked.wait()
            self._asked = trio.Event()
            self._session.sweep(trio.current_time())
            self._swept()
            if self._heard and not self.in_doubt:
                continue
            if not await self._answers():
                if self.in_doubt:
                    return f"the peer was asked and silent for {DOUBT_SECONDS:.0f} s"
                silent = self._keepalive_seconds + self._dead_after_seconds
                return f"the peer was silent for {silent:.0f} s"

    async def _answers(self) -> bool:
        """Ping; return whether anything arrives in time."""
        self._heard = False
        self._nonce += 1
        self._session.ping(self._nonce)
        self._kick()
        with trio.move_on_after(self._dead_after_seconds) as scope:
            while not self._heard:
                if self.in_doubt:  # that may come up while we wait
                    by = self._doubted_at + DOUBT_SECONDS
                    scope.deadline = min(scope.deadline, by)
                await self._stirred.park()
        if self._heard:
            self.in_doubt = False
        return self._heard
