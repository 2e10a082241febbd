"""When reachability is looked at again: pure."""

from __future__ import annotations

from nat.reachability.config import ReachabilityConfig
from nat.reachability.core import Status


class Schedule:
    """Rounds: at boot, slowly while the verdict stands, sooner while it is unknown.

    Args:
        config: Intervals.
        now: Monotonic seconds; the first round is due after the settling time.
    """

    def __init__(self, config: ReachabilityConfig, now: float) -> None:
        self._config = config
        self._retry = config.first_retry_seconds
        self.due = now + config.settle_seconds

    def hurry(self, now: float) -> None:
        """Have a round soon: the network changed, or a new peer can be asked."""
        self._retry = self._config.first_retry_seconds
        self.due = min(self.due, now + self._config.settle_seconds)

    def finished(self, status: Status, now: float) -> None:
        """Plan the next round after one that ended with ``status``."""
        if status == "unknown":
            self.due = now + self._retry
            self._retry = min(2 * self._retry, self._config.stable_seconds)
        else:
            self._retry = self._config.first_retry_seconds
            self.due = now + self._config.stable_seconds
