"""When to attest with which connected peer: pure, driven by ``now``.

After success: one interval, varied by the jitter. After failure: backoff from 5 s,
doubling, up to half an interval, so that a peer that returns is not kept waiting.
Of two peers that connect, the one with the smaller id asks first; the other waits
``YIELD_SECONDS`` and by then usually finds itself answered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from fabric.core.ids import PeerId

FIRST_BACKOFF_SECONDS = 5.0
YIELD_SECONDS = 2.0


@dataclass
class _Turn:
    at: float
    failures: int = 0
    running: bool = False


@dataclass
class Schedule:
    """Turns of the peers we are connected to; bounded by the connections.

    Attributes:
        own: Our identity.
        interval: Seconds between two exchanges with one peer.
        jitter: Fraction by which an interval varies.
        rng: Source of the jitter.
    """

    own: PeerId
    interval: float
    jitter: float
    rng: random.Random
    _turns: dict[PeerId, _Turn] = field(default_factory=dict)

    def on_connected(self, peer: PeerId, now: float, *, current: bool) -> None:
        """Plan the first turn; a peer with a ``current`` standing waits an interval."""
        if peer in self._turns:
            return
        if current:
            wait = self._varied(self.interval)
        else:
            wait = 0.0 if self.own < peer else YIELD_SECONDS
        self._turns[peer] = _Turn(now + wait)

    def on_disconnected(self, peer: PeerId) -> None:
        """Forget ``peer``."""
        self._turns.pop(peer, None)

    def due(self, now: float) -> list[PeerId]:
        """Return the peers whose turn it is; each runs until its result is told."""
        ready = [p for p, t in self._turns.items() if not t.running and t.at <= now]
        for peer in ready:
            self._turns[peer].running = True
        return ready

    def running(self, peer: PeerId) -> bool:
        """Return whether the turn of ``peer`` is still open."""
        turn = self._turns.get(peer)
        return turn is not None and turn.running

    def on_success(self, peer: PeerId, now: float) -> None:
        """Plan the next turn; also called when the peer attested with us unasked."""
        if peer in self._turns:
            self._turns[peer] = _Turn(now + self._varied(self.interval))

    def on_failure(self, peer: PeerId, now: float) -> None:
        """Plan a retry."""
        turn = self._turns.get(peer)
        if turn is not None:
            backoff = FIRST_BACKOFF_SECONDS * 2 ** min(turn.failures, 20)
            wait = self._varied(min(backoff, self.interval / 2))
            self._turns[peer] = _Turn(now + wait, turn.failures + 1)

    def next_timeout(self) -> float | None:
        """Return when :meth:`due` should be asked again, or None."""
        waiting = [t.at for t in self._turns.values() if not t.running]
        return min(waiting, default=None)

    def _varied(self, seconds: float) -> float:
        return seconds * self.rng.uniform(1 - self.jitter, 1 + self.jitter)
