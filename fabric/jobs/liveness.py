"""Who answers? Suspicion from silence, with a guard against our own stalls.

A peer is lost when it was silent for ``patience`` *and* at least two calls to it failed
meanwhile: after our own process slept, everybody looks silent, but nobody has failed.
Slow is not dead: whoever answers beats is alive, however long its work takes.

A broken connection is a hint that shortens the wait, never a proof. Of a dead process
the machine refuses new connections at once; of a paused or partitioned one nobody does.
So a peer is also lost when its connection broke QUICK patiences ago and at least two
calls that *started* after that were refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from fabric.core.ids import PeerId

FAILURES = 2
"""Failed calls without a success in between before silence counts."""

QUICK = 0.2
"""Patiences after a broken connection before refused calls count as death."""


class Liveness:
    """When each watched peer was last heard, and what failed since."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._heard: dict[PeerId, float] = {}
        self._failures: dict[PeerId, int] = {}
        self._broke: dict[PeerId, float] = {}
        self._refused: dict[PeerId, int] = {}

    def watch(self, peers: Iterable[PeerId], now: float) -> None:
        """Watch exactly ``peers``; new ones count as heard just now."""
        self._heard = {peer: self._heard.get(peer, now) for peer in peers}
        self._failures = dict.fromkeys(self._heard, 0)
        self._broke, self._refused = {}, {}

    def heard(self, peer: PeerId, now: float) -> None:
        """``peer`` said or answered something."""
        if peer in self._heard:
            self._heard[peer], self._failures[peer] = now, 0
            self._broke.pop(peer, None)
            self._refused.pop(peer, None)

    def broke(self, peer: PeerId, now: float) -> bool:
        """The connection with ``peer`` broke; return whether we watch it."""
        if peer in self._heard:
            self._broke.setdefault(peer, now)
            self._refused.setdefault(peer, 0)
        return peer in self._heard

    def failed(self, peer: PeerId, refused_from: float | None = None) -> bool:
        """A call to ``peer`` failed.

        Args:
            peer: The peer.
            refused_from: When the call started, if it was refused at once.

        Returns:
            Whether it was refused after the connection with ``peer`` had broken.
        """
        if peer in self._failures:
            self._failures[peer] += 1
        since = self._broke.get(peer)
        if since is None or refused_from is None or refused_from < since:
            return False
        self._refused[peer] += 1
        return True

    def lost(self, now: float) -> frozenset[PeerId]:
        """Return the watched peers that are lost."""
        return frozenset(
            peer
            for peer, at in self._heard.items()
            if (now - at >= self._patience and self._failures[peer] >= FAILURES)
            or self._is_refused(peer, now)
        )

    def _is_refused(self, peer: PeerId, now: float) -> bool:
        since = self._broke.get(peer)
        late = since is not None and now - since >= QUICK * self._patience
        return late and self._refused[peer] >= FAILURES
