"""Find out which protocol the gateway speaks: ask all at once, prefer the best.

PCP, NAT-PMP and UPnP are asked at the same time, since a router that lacks one is
silent and waiting for silence is slow. A method that works is taken when every
preferred one has failed, or when they had ``prefer_seconds`` to answer as well; the one
that worked last time is taken at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from nat.portmap.config import Method, PortMapConfig


class MethodSearch:
    """One round of questions to one gateway.

    Args:
        methods: What is tried, the preferred one first.
        config: Times.
        now: Start.
        remembered: The method that worked here before, if any.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        config: PortMapConfig,
        now: float,
        remembered: Method | None,
    ) -> None:
        self._methods = tuple(methods)
        self._prefer_seconds = config.prefer_seconds
        self._remembered = remembered
        self._deadline = now + config.search_seconds
        self._worked_at: dict[Method, float] = {}
        self.failures: dict[Method, str] = {}

    @property
    def open(self) -> tuple[Method, ...]:
        """The methods that have not answered yet."""
        return tuple(
            method
            for method in self._methods
            if method not in self._worked_at and method not in self.failures
        )

    def works(self, method: Method, now: float) -> None:
        """Note that ``method`` answered well."""
        if method in self.open:
            self._worked_at[method] = now

    def fail(self, method: Method, reason: str) -> None:
        """Note that ``method`` cannot be used here."""
        if method in self.open:
            self.failures[method] = reason

    def choose(self, now: float) -> Method | None:
        """Return the method to use, or None to wait (or to give up: see over)."""
        if self._remembered in self._worked_at:
            return self._remembered
        for method in self._methods:
            if method in self._worked_at:
                patient = now < min(self._patience_ends(), self._deadline)
                better = self._methods[: self._methods.index(method)]
                if patient and any(other in self.open for other in better):
                    return None
                return method
        return None

    def over(self, now: float) -> bool:
        """Return whether nothing works, or nothing did in time."""
        if self._worked_at:
            return False
        return not self.open or now >= self._deadline

    def next_timeout(self) -> float:
        """Return when :meth:`choose` or :meth:`over` may answer otherwise."""
        return min(self._deadline, self._patience_ends())

    def _patience_ends(self) -> float:
        if not self._worked_at:
            return inf
        return min(self._worked_at.values()) + self._prefer_seconds
