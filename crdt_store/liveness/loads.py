"""How busy others are: their own word, kept for 30 s, in memory only."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable

from crdt_store.liveness.messages import MAX_REPORTS, Load, Report
from fabric.core.ids import PeerId

KEPT_SECONDS = 30.0
MAX_KEPT = 128
"""Peers whose load is remembered; a larger mesh knows the loads of those met last."""


class Loads:
    """The latest load of each peer heard of, with when it was so."""

    def __init__(self) -> None:
        self._heard: dict[PeerId, tuple[float, Load]] = {}
        self._met: deque[PeerId] = deque(maxlen=MAX_REPORTS)

    def hear(self, peer: PeerId, load: Load, at: float, *, met: bool = False) -> None:
        """Note that ``peer`` had ``load`` at that time; ``met``: it said so itself."""
        held = self._heard.get(peer)
        if held is not None and held[0] >= at:
            return
        if held is None and len(self._heard) >= MAX_KEPT:
            del self._heard[next(iter(self._heard))]
        self._heard[peer] = (at, load)
        if met and peer not in self._met:
            self._met.append(peer)

    def hear_reports(
        self,
        reports: Iterable[Report],
        sender: PeerId,
        members: Container[PeerId],
        now: float,
    ) -> None:
        """Note what ``sender`` heard of other ``members``."""
        heard = self._heard
        for report in reports:  # :meth:`hear` in line: nothing is called more often
            peer, at = report.peer, now - report.age_ms / 1000
            if peer == sender or peer not in members:
                continue
            held = heard.get(peer)
            if held is None:
                if len(heard) >= MAX_KEPT:
                    del heard[next(iter(heard))]
            elif held[0] >= at:
                continue
            heard[peer] = (at, report.load)

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
        """Return the loads that peers told us last, to pass on."""
        heard = self._heard
        return tuple(
            [
                Report(peer, int(age * 1000), held[1])
                for peer in self._met
                if (held := heard.get(peer)) is not None
                and 0 <= (age := now - held[0]) < KEPT_SECONDS / 2
            ]
        )
