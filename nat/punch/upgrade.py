"""When a relayed peer is asked again to become direct: pure.

Every peer whose RPC runs over a relay is due at once, then after growing waits while
the failure may pass; never again while nothing can change, until the network does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fabric.core.ids import PeerId
from nat.punch.backoff import Backoff

MAX_RUNNING = 4
"""Upgrades at once: each punches from the same NAT, whose tables are small."""


class UpgradeCore:
    """Tracks the relayed peers. ``now`` is monotonic seconds.

    Args:
        retry_seconds: Waits after the first, second and every further failure.
        max_running: Upgrades at once.
    """

    def __init__(
        self, retry_seconds: Sequence[float], max_running: int = MAX_RUNNING
    ) -> None:
        self._backoff = Backoff(retry_seconds)
        self._max_running = max_running
        self._relayed: dict[PeerId, None] = {}  # in the order in which they came
        self._running: set[PeerId] = set()

    def update(self, relayed: frozenset[PeerId]) -> None:
        """Take ``relayed`` as the peers whose RPC is on a relay now.

        A peer that left the set keeps its failures: a path that flaps must not be a
        way around the backoff. A direct path forgets them, see :meth:`ended`.
        """
        for peer in [peer for peer in self._relayed if peer not in relayed]:
            del self._relayed[peer]
        self._relayed.update(dict.fromkeys(sorted(relayed - self._relayed.keys())))

    def start(self, now: float) -> list[PeerId]:
        """Return the peers to upgrade now; each is answered with :meth:`ended`."""
        room = self._max_running - len(self._running)
        due = [
            peer
            for peer in self._relayed
            if peer not in self._running and self._backoff.due(peer) <= now
        ]
        due.sort(key=self._backoff.due)
        chosen = due[: max(0, room)]
        self._running.update(chosen)
        return chosen

    def ended(
        self, peer: PeerId, now: float, *, failure: str = "", may_pass: bool = True
    ) -> None:
        """Note how an upgrade ended; an empty ``failure`` means that it worked."""
        self._running.discard(peer)
        if failure:
            self._backoff.failed(peer, now, failure, may_pass=may_pass)
        else:
            self._backoff.succeeded(peer)
            self._relayed.pop(peer, None)

    def network_changed(self) -> None:
        """Try everyone again: what was impossible may be possible now."""
        self._backoff.network_changed()

    def next_at(self) -> float:
        """Return when :meth:`start` has something next; ``inf`` when nothing is due."""
        if len(self._running) >= self._max_running:
            return math.inf
        waiting = [p for p in self._relayed if p not in self._running]
        return min((self._backoff.due(p) for p in waiting), default=math.inf)

    def reason(self, peer: PeerId) -> str:
        """Return why ``peer`` is still on a relay, or nothing when not tried yet."""
        return self._backoff.reason(peer)
