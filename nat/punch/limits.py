"""Who may make us punch, and how often: pure.

A punch that a peer asks for costs a port, some connections and SYNs to addresses of its
choice. Members are not trusted with more of that than they can use.
"""

from __future__ import annotations

from collections import Counter

from fabric.core.errors import ResourceExhausted
from fabric.core.ids import PeerId
from nat.punch.config import PunchConfig

BUSY = "E_PUNCH_BUSY"
_MAX_PEERS = 1024
_ALL_FACTOR = 10
"""All peers together may ask this many times as often as one."""


class _Allowance:
    """A bucket of ``burst`` grants that refills by one each ``interval``."""

    def __init__(self, burst: int, interval_seconds: float, now: float) -> None:
        self._burst = float(burst)
        self._interval = interval_seconds
        self._left = float(burst)
        self._at = now

    def left(self, now: float) -> float:
        """Return the grants available at ``now``."""
        if now > self._at:
            income = (now - self._at) / self._interval
            self._left = min(self._burst, self._left + income)
            self._at = now
        return self._left

    def take(self) -> None:
        """Use one; the caller has looked at what is left."""
        self._left -= 1.0


class PunchLimits:
    """Counts the punches that peers asked for. ``now`` is monotonic seconds."""

    def __init__(self, config: PunchConfig) -> None:
        self._config = config
        self._all: _Allowance | None = None
        self._each: dict[PeerId, _Allowance] = {}
        self._open: Counter[PeerId] = Counter()
        self._sockets: Counter[PeerId] = Counter()

    def begin_untrusted(self, peer: PeerId, now: float) -> None:
        """Count one punch of ``peer`` as begun; :meth:`end` must follow.

        Raises:
            ResourceExhausted: too many, too often, or its sockets are too many.
        """
        config = self._config
        if self._open.total() >= config.max_inbound:
            raise _busy(f"{config.max_inbound} punches run here")
        if self._open[peer] >= config.max_inbound_per_peer:
            raise _busy(f"{config.max_inbound_per_peer} punches with this peer run")
        if self._sockets[peer] >= config.max_accepted_sockets_per_peer:
            raise _busy(f"{self._sockets[peer]} punched sockets of this peer are open")
        mine, everyone = self._allowances(peer, now)
        if mine.left(now) < 1.0 or everyone.left(now) < 1.0:
            raise _busy("punches are asked for too often")
        mine.take()
        everyone.take()
        self._open[peer] += 1

    def end(self, peer: PeerId) -> None:
        """Count one punch of ``peer`` as ended."""
        _decrease(self._open, peer)

    def socket_opened(self, peer: PeerId) -> None:
        """Count one punched socket of ``peer`` as handed to the data plane."""
        self._sockets[peer] += 1

    def socket_closed(self, peer: PeerId) -> None:
        """Count one as closed."""
        _decrease(self._sockets, peer)

    def _allowances(self, peer: PeerId, now: float) -> tuple[_Allowance, _Allowance]:
        burst = self._config.inbound_burst
        interval = self._config.inbound_interval_seconds
        if self._all is None:
            self._all = _Allowance(burst * _ALL_FACTOR, interval / _ALL_FACTOR, now)
        # the longest silent goes first: its allowance has refilled the most
        found = self._each.pop(peer, None) or _Allowance(burst, interval, now)
        while len(self._each) >= _MAX_PEERS:
            del self._each[next(iter(self._each))]
        self._each[peer] = found
        return found, self._all


def _busy(reason: str) -> ResourceExhausted:
    return ResourceExhausted(reason, code=BUSY, next_step="ask again in some seconds")


def _decrease(counter: Counter[PeerId], peer: PeerId) -> None:
    counter[peer] -= 1
    if counter[peer] <= 0:
        del counter[peer]
