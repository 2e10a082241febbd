"""The book of budgets: who holds how many connections, and what each may send.

Pure: connections are keys, rates are numbers. The shell (``pacing.py``) reports what
each connection does and sets what :meth:`RateBook.rates` says. Rates are max-min fair,
first among peers and then among the connections of each, so that a peer gains nothing
by opening more of them (Bertsekas and Gallager, Data Networks, section 6.5.2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import TypeVar

import msgspec

from fabric.core.errors import ResourceExhausted
from fabric.core.ids import PeerId, short
from fabric.net.budget_config import BudgetConfig

K = TypeVar("K", bound=Hashable)

IDLE_SHARE = 0.01
"""Part of a budget that all idle connections share, until the next look."""
GROWTH = 1.5
"""A connection below its rate may grow by this between two looks."""
BUSY_PART = 0.7
"""Above this part of its rate, a connection is limited by it."""
PATIENT_LOOKS = 4
"""A connection that starts to send gets its whole share for so many looks."""


class Use(msgspec.Struct, frozen=True):
    """What a connection did since the last look.

    Attributes:
        bytes_per_second: Sent and acknowledged.
        waiting: Whether bytes wait in the kernel: it would send more.
    """

    bytes_per_second: float
    waiting: bool


class _Line(msgspec.Struct):
    peer: PeerId
    use: Use = Use(0.0, False)
    rate: float = math.inf
    looks: int = 0  # since it began to send, and it did not reach its rate


class RateBook:
    """Connections with their peers and rates.

    Args:
        config: The budgets; may be replaced at any time.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self._lines: dict[Hashable, _Line] = {}
        self._by_peer: defaultdict[PeerId, set[Hashable]] = defaultdict(set)

    def check(self, peer: PeerId) -> None:
        """Refuse a connection more with ``peer``.

        Raises:
            ResourceExhausted: E_BUDGET, with the number that was reached.
        """
        config = self.config
        held = len(self._by_peer.get(peer, ()))
        if 0 < config.max_connections_per_peer <= held:
            raise ResourceExhausted(
                f"{held} data-plane connections with {short(peer)} are open",
                code="E_BUDGET",
                next_step="close some, or raise max_connections_per_peer",
            )
        if 0 < config.max_connections <= len(self._lines):
            raise ResourceExhausted(
                f"{len(self._lines)} data-plane connections are open",
                code="E_BUDGET",
                next_step="retry later, or raise max_connections",
            )

    def add(self, key: Hashable, peer: PeerId) -> None:
        """Enter a connection; whether there is room is for :meth:`check` to say."""
        self.remove(key)
        self._lines[key] = _Line(peer)
        self._by_peer[peer].add(key)

    def remove(self, key: Hashable) -> None:
        """Forget a connection; unknown ones are forgotten already."""
        line = self._lines.pop(key, None)
        if line is None:
            return
        self._by_peer[line.peer].discard(key)
        if not self._by_peer[line.peer]:
            del self._by_peer[line.peer]

    def report(self, key: Hashable, use: Use) -> None:
        """Take note of what a connection did since the last look."""
        line = self._lines.get(key)
        if line is None:
            return
        line.use = use
        limited = use.bytes_per_second >= BUSY_PART * line.rate
        line.looks = line.looks + 1 if use.waiting and not limited else 0

    def rates(self) -> dict[Hashable, float]:
        """Return bytes per second of each connection; infinite without a budget.

        The sum never exceeds the budgets. Connections that use less than their share
        keep room to grow, those that wait to send share the rest.
        """
        config = self.config
        total = config.max_up_bytes_per_second or math.inf
        each = config.max_up_bytes_per_second_per_peer or math.inf
        if not math.isfinite(min(total, each)):
            return self._settle(dict.fromkeys(self._lines, math.inf))
        floor = IDLE_SHARE * min(total, each) / max(1, len(self._lines))
        wanted = {key: _wanted(line, floor) for key, line in self._lines.items()}
        of_peer = {
            peer: min(each, sum(wanted[key] for key in keys))
            for peer, keys in self._by_peer.items()
        }
        result: dict[Hashable, float] = {}
        granted = fill(total, of_peer, each)
        for peer, keys in self._by_peer.items():
            mine = {key: wanted[key] for key in keys}
            result.update(fill(granted[peer], mine, math.inf))
        return self._settle(result)

    def _settle(self, rates: dict[Hashable, float]) -> dict[Hashable, float]:
        for key, rate in rates.items():
            self._lines[key].rate = rate
        return rates


def _wanted(line: _Line, floor: float) -> float:
    """Return what a connection could use until the next look."""
    if line.use.waiting and line.looks < PATIENT_LOOKS:
        return math.inf
    return floor + GROWTH * line.use.bytes_per_second


def fill(capacity: float, wanted: Mapping[K, float], most: float) -> dict[K, float]:
    """Return the max-min fair split of ``capacity``, with what is left spread evenly.

    Args:
        capacity: To split; may be infinite.
        wanted: Each gets at most this, until all have it.
        most: No one gets more than this, whatever is left.
    """
    result: dict[K, float] = {}
    left, waiting = capacity, len(wanted)
    for key, want in sorted(wanted.items(), key=lambda item: item[1]):
        share = min(want, most, left / waiting)
        result[key] = share
        left -= share
        waiting -= 1
    if not math.isfinite(left):
        return dict.fromkeys(wanted, most)
    spare = max(0.0, left) / len(wanted) if wanted else 0.0
    return {key: min(most, share + spare) for key, share in result.items()}
