"""How busy others are: their own word, kept for 30 s, in memory only."""

from __future__ import annotations

from crdt_store.liveness.messages import MAX_REPORTS, Load, Report
from fabric.core.ids import PeerId

KEPT_SECONDS = 30.0
MAX_KEPT = 128
"""Peers whose load is remembered; a larger mesh knows the loads of those met last."""


class Loads:
    """The latest load of each peer heard of, with when it was so."""

    def __init__(self) -> None:
        self._heard: dict[PeerId, tuple[float, Load]] = {}

    def hear(self, peer: PeerId, load: Load, at: float) -> None:
        """Note that ``peer`` had ``load`` at that time."""
        held = self._heard.pop(peer, None)
        newer = held is None or held[0] < at
        self._heard[peer] = (at, load) if newer or held is None else held
        if len(self._heard) > MAX_KEPT:
            del self._heard[min(self._heard, key=lambda p: self._heard[p][0])]

    def get(self, peer: PeerId, now: float) -> Load | None:
        """Return the load of ``peer``; None when it is unknown or too old."""
        held = self._heard.get(peer)
        if held is None or now - held[0] > KEPT_SECONDS:
            return None
        return held[1]

    def forget(self, peer: PeerId) -> None:
        """Forget somebody who is dead or no member any more."""
        self._heard.pop(peer, None)

    def reports(self, now: float) -> tuple[Report, ...]:
        """Return the loads heard last, to pass on."""
        last = list(self._heard.items())[-MAX_REPORTS:]
        return tuple(
            Report(peer, int((now - at) * 1000), load)
            for peer, (at, load) in last
            if 0 <= now - at < KEPT_SECONDS / 2
        )
