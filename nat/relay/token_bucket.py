"""A token bucket that lends: who takes is told how long to wait, and then may send.

Tokens are bytes; they come in at a constant rate and at most ``burst_bytes`` of them
are kept. Taking never fails: a taker goes into debt and waits until it is paid, so
takers are served in order and a piece may be larger than the burst. Over any span of
``t`` seconds at most ``burst_bytes + rate * t`` bytes pass, plus the piece at its end.
"""

from __future__ import annotations

import math


class TokenBucket:
    """See the module. Pure: ``now`` is monotonic seconds, never going back.

    Args:
        rate_bytes_per_second: Income; ``math.inf`` for no limit.
        burst_bytes: What is there at first and at most.
    """

    def __init__(self, rate_bytes_per_second: float, burst_bytes: float) -> None:
        if not rate_bytes_per_second > 0 or not burst_bytes >= 0:
            raise ValueError("a bucket needs a rate above 0 and no negative burst")
        self.rate_bytes_per_second = rate_bytes_per_second
        self.burst_bytes = burst_bytes
        self._tokens = float(burst_bytes)
        self._at: float | None = None

    def take(self, num_bytes: int, now: float) -> float:
        """Take ``num_bytes``; return the seconds to wait before they may be sent."""
        if math.isinf(self.rate_bytes_per_second):
            return 0.0
        self._refill(now)
        self._tokens -= num_bytes
        return self._debt_seconds()

    def wait_seconds(self, now: float) -> float:
        """Return how long a taker of one byte would have to wait now."""
        if math.isinf(self.rate_bytes_per_second):
            return 0.0
        self._refill(now)
        return self._debt_seconds()

    def available(self, now: float) -> float:
        """Return how many bytes may pass at once now; negative while in debt."""
        if math.isinf(self.rate_bytes_per_second):
            return math.inf
        self._refill(now)
        return self._tokens

    def give_back(self, num_bytes: int) -> None:
        """Return tokens that were taken and not used."""
        self._tokens = min(self.burst_bytes, self._tokens + num_bytes)

    def _debt_seconds(self) -> float:
        return max(0.0, -self._tokens / self.rate_bytes_per_second)

    def _refill(self, now: float) -> None:
        if self._at is not None and now > self._at:
            income = (now - self._at) * self.rate_bytes_per_second
            self._tokens = min(self.burst_bytes, self._tokens + income)
        if self._at is None or now > self._at:
            self._at = now
