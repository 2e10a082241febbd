"""Whether the peer at the other end of an RPC connection is still there: pure.

A ping goes out every second and measures the round trip. A connection is over when
nothing arrived, or nothing could be sent, for ``dead_after_seconds``. When something
says that the path may be dead (another connection broke, our network changed, the peer
dialled anew), waiting that long is a waste: the peer is asked at once, and has
``doubt_seconds`` to say anything.
"""

from __future__ import annotations

import math

from fabric.core.errors import PeerTimeout
from fabric.net.data_config import RpcConfig

_RTT_GAIN = 1 / 8  # RFC 6298, section 2
_MAX_ID = 2**32 - 1
_DOUBT_ROUND_TRIPS = 4
"""A slow path gets this many round trips to answer."""


class Liveness:
    """Of one connection.

    Args:
        config: Times.
        now: Seconds, monotonic; the same clock as every later ``now``.

    Attributes:
        rtt_seconds: Smoothed round-trip time, or None before the first answer.
    """

    def __init__(self, config: RpcConfig, now: float) -> None:
        self.rtt_seconds: float | None = None
        self._config = config
        self._last_received = now
        self._next_ping = now
        self._ping_id = 0
        self._ping_sent: float | None = None
        self._stalled_since: float | None = None  # bytes wait and none left since
        self._doubted_at = 0.0
        self._doubt_ends = math.inf

    @property
    def in_doubt(self) -> bool:
        """Whether an answer to :meth:`doubt` is missing."""
        return self._doubt_ends < math.inf

    def silent_seconds(self, now: float) -> float:
        """Return how long nothing has arrived."""
        return now - self._last_received

    def doubt(self, now: float) -> None:
        """Ping at once; anything that arrives from now on is the answer."""
        if not self.in_doubt:
            patience = _DOUBT_ROUND_TRIPS * (self.rtt_seconds or 0.0)
            self._doubted_at = self._next_ping = now
            self._doubt_ends = now + max(self._config.doubt_seconds, patience)

    def on_received(self, now: float) -> None:
        """Bytes arrived."""
        self._last_received = now
        self._doubt_ends = math.inf

    def on_sent(self) -> None:
        """Bytes left."""
        self._stalled_since = None

    def on_pong(self, ping: int, now: float) -> None:
        """A ping was answered; an old one measures nothing."""
        if ping != self._ping_id or self._ping_sent is None:
            return
        sample = now - self._ping_sent
        self._ping_sent = None
        if self.rtt_seconds is None:
            self.rtt_seconds = sample
        else:
            self.rtt_seconds += _RTT_GAIN * (sample - self.rtt_seconds)

    def next_timeout(self) -> float:
        """Return when :meth:`on_timeout` has something to do."""
        dead_at = self._last_received + self._config.dead_after_seconds
        return min(self._next_ping, dead_at, self._doubt_ends)

    def on_late(self, now: float) -> None:
        """We were not run in time, so the peer's bytes may wait unread.

        It gets another interval before it counts as silent.
        """
        interval = self._config.ping_interval_seconds
        heard = now + interval - self._config.dead_after_seconds
        self._last_received = max(self._last_received, heard)
        if self.in_doubt:
            self._doubt_ends = max(self._doubt_ends, now + interval)

    def on_timeout(self, now: float, queued_bytes: int) -> int | None:
        """Return the id of a ping to send now, or None.

        Raises:
            PeerTimeout: the peer sent nothing, or took none of ``queued_bytes``, for
                too long.
        """
        self._check(now, queued_bytes)
        if now < self._next_ping:
            return None
        self._next_ping = now + self._config.ping_interval_seconds
        self._ping_id = self._ping_id % _MAX_ID + 1
        self._ping_sent = now
        return self._ping_id

    def _check(self, now: float, queued_bytes: int) -> None:
        limit = self._config.dead_after_seconds
        silent = self.silent_seconds(now)
        if silent >= limit:
            raise PeerTimeout(f"peer was silent for {silent:.1f} s")
        if now >= self._doubt_ends:
            asked = now - self._doubted_at
            raise PeerTimeout(f"peer did not say within {asked:.1f} s that it is there")
        if not queued_bytes:
            return
        if self._stalled_since is None:
            self._stalled_since = now
        elif now - self._stalled_since >= limit:
            raise PeerTimeout(f"peer took none of {queued_bytes} B for {limit:.1f} s")
