"""Hybrid logical clock: wall time that never runs backwards.

A stamp is milliseconds << 16 | counter. Before a stamp is used, a *mark* at or above it
is on disk (FULL sync); after a restart the clock goes on above the mark, so that no
stamp is ever given twice, whatever the wall clock did meanwhile. A mark reaches
RESERVE_SECONDS ahead of the wall, hence one FULL sync per that time, not per write; and
because it is bound to the wall, quick restarts do not push the clock further and
further ahead.

Source: Kulkarni et al., "Logical Physical Clocks" (2014).
"""

from __future__ import annotations

_COUNTER_BITS = 16
RESERVE_SECONDS = 5.0
"""How far ahead of the wall a mark reaches: the most a restart can jump forward."""
MAX_FUTURE_SECONDS = 60.0
"""Entries further ahead of the receiver's clock are held until they are due."""
_MAX_OBSERVED_LEAD_SECONDS = MAX_FUTURE_SECONDS / 2
"""Other authors can push our clock ahead by half the tolerance, so never out of it."""


def stamp(seconds: float) -> int:
    """Return the smallest stamp at ``seconds`` of wall time."""
    return int(seconds * 1000) << _COUNTER_BITS


def wall_seconds(hlc: int) -> float:
    """Return the wall seconds of a stamp."""
    return (hlc >> _COUNTER_BITS) / 1000


class HybridClock:
    """Gives stamps.

    Args:
        mark: The last mark on disk, or 0 on a fresh disk.
    """

    def __init__(self, mark: int = 0) -> None:
        self._last = mark
        self._mark = mark

    @property
    def last(self) -> int:
        """The greatest stamp given or observed."""
        return self._last

    def tick(self, now: float) -> int:
        """Return a stamp above every earlier one; see :meth:`mark_to_save`."""
        self._last = max(self._last + 1, stamp(now))
        return self._last

    def observe(self, hlc: int, now: float, *, own: bool = False) -> None:
        """Make later stamps greater than ``hlc``.

        Args:
            hlc: Stamp of an accepted entry.
            now: Wall seconds.
            own: The entry is ours (a disk restored from backup meets its own past):
                follow it without limit.
        """
        limit = hlc if own else stamp(now + _MAX_OBSERVED_LEAD_SECONDS)
        self._last = max(self._last, min(hlc, limit))

    def mark_to_save(self, now: float) -> int | None:
        """Return the mark that must be on disk before the last stamp is used."""
        if self._last <= self._mark:
            return None
        ahead_of_wall = self._last + (1 << _COUNTER_BITS)
        return max(ahead_of_wall, stamp(now + RESERVE_SECONDS))

    def saved(self, mark: int) -> None:
        """Note that ``mark`` is on disk."""
        self._mark = max(self._mark, mark)
