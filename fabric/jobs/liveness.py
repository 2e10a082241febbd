"""Who answers? Suspicion from silence, with a guard against our own stalls.

A peer is lost when it was silent for ``patience`` *and* at least two calls to it failed
meanwhile: after our own process slept, everybody looks silent, but nobody has failed.
Slow is not dead: whoever answers beats is alive, however long its work takes.
"""

from __future__ import annotations

from collections.abc import Iterable

from fabric.core.ids import PeerId

FAILURES = 2
"""Failed calls without a success in between before silence counts."""


class Liveness:
    """When each watched peer was last heard, and what failed since."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._heard: dict[PeerId, float] = {}
        self._failures: dict[PeerId, int] = {}

    def watch(self, peers: Iterable[PeerId], now: float) -> None:
        """Watch exactly ``peers``; new ones count as heard just now."""
        self._heard = {peer: self._heard.get(peer, now) for peer in peers}
        self._failures = dict.fromkeys(self._heard, 0)

    def heard(self, peer: PeerId, now: float) -> None:
        """``peer`` said or answered something."""
        if peer in self._heard:
            self._heard[peer], self._failures[peer] = now, 0

    def failed(self, peer: PeerId) -> None:
        """A call to ``peer`` failed."""
        if peer in self._failures:
            self._failures[peer] += 1

    def lost(self, now: float) -> frozenset[PeerId]:
        """Return the watched peers that are lost."""
        return frozenset(
            peer
            for peer, at in self._heard.items()
            if now - at >= self._patience and self._failures[peer] >= FAILURES
        )
