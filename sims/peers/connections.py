"""Who keeps a connection with whom: the daemon's own rule, for all peers of a run.

In a daemon each peer asks :class:`fabric.app.neighbours.Neighbours` for itself. All
would find the same on rings that hold whoever is up, so one set of rings serves a whole
side of a partition here. The tens of seconds until a ghost's neighbours replace it are
left out: they have 47 others.
"""

from __future__ import annotations

from collections.abc import Mapping

from fabric.app.neighbours import Rings
from fabric.core.ids import PeerId

_NOBODY: frozenset[PeerId] = frozenset()


class Connections:
    """The connections of all peers.

    Args:
        most: Connections of a peer; 0: with everybody.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sides: Mapping[int, frozenset[PeerId]] = {}
        self._rings: dict[int, Rings] = {}
        self._chosen: dict[PeerId, frozenset[PeerId]] = {}
        self._changed: set[PeerId] = set()

    def set_sides(self, sides: Mapping[int, frozenset[PeerId]]) -> None:
        """Note who is up, by side of the partition."""
        before, self._sides = self._sides, sides
        for side in sorted(before.keys() | sides.keys()):
            was, now = before.get(side, _NOBODY), sides.get(side, _NOBODY)
            if was != now:
                self._change(side, was, now)

    def _change(
        self, side: int, was: frozenset[PeerId], now: frozenset[PeerId]
    ) -> None:
        if not self._bounded(was) or not self._bounded(now):
            touched = set(was | now)
            if self._bounded(now):
                self._rings[side] = Rings(self._most // 2)
                self._rings[side].set_peers(now)
        else:
            rings = self._rings[side]
            touched = set(was ^ now)
            for peer in was - now:
                touched |= rings.around(peer)
            rings.set_peers(now)
            for peer in now - was:
                touched |= rings.around(peer)
        for peer in touched:
            self._chosen.pop(peer, None)
        self._changed |= touched

    def _bounded(self, peers: frozenset[PeerId]) -> bool:
        return 0 < self._most < len(peers) - 1

    def chosen(self, peer: PeerId, side: int) -> frozenset[PeerId] | None:
        """Return the neighbours of ``peer``; None while they are all members."""
        bounded = self._bounded(self._sides.get(side, _NOBODY))
        return self.of(peer, side) if bounded else None

    def of(self, peer: PeerId, side: int) -> frozenset[PeerId]:
        """Return with whom ``peer`` of ``side`` is connected."""
        found = self._chosen.get(peer)
        if found is None:
            up = self._sides.get(side, _NOBODY)
            if peer not in up:
                return _NOBODY
            around = self._rings[side].around(peer) if self._bounded(up) else up
            found = self._chosen[peer] = frozenset(around) - {peer}
        return found

    def take_changed(self) -> set[PeerId]:
        """Return and forget whose connections may have changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed
