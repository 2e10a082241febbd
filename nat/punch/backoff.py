"""When to try something with a peer again: pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fabric.core.ids import PeerId

_MAX_PEERS = 1024


@dataclass
class _Record:
    failures: int
    due: float
    reason: str


class Backoff:
    """Remembers failures by peer; a success or a changed network forgets them.

    Args:
        steps_seconds: Wait after the first, second, .. failure; the last repeats.
    """

    def __init__(self, steps_seconds: Sequence[float]) -> None:
        if not steps_seconds or min(steps_seconds) < 0:
            raise ValueError("a backoff needs steps, none of them negative")
        self._steps = tuple(steps_seconds)
        self._records: dict[PeerId, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def due(self, peer: PeerId) -> float:
        """Return from when on to try; ``-inf`` = at once, ``inf`` = not like this."""
        record = self._records.get(peer)
        return -math.inf if record is None else record.due

    def reason(self, peer: PeerId) -> str:
        """Return why the last try failed, or nothing."""
        record = self._records.get(peer)
        return "" if record is None else record.reason

    def failed(
        self, peer: PeerId, now: float, reason: str, *, may_pass: bool = True
    ) -> float:
        """Count a failure; return from when on to try again."""
        old = self._records.pop(peer, None)
        failures = 1 if old is None else old.failures + 1
        step = self._steps[min(failures, len(self._steps)) - 1]
        due = now + step if may_pass else math.inf
        while len(self._records) >= _MAX_PEERS:  # the one longest without a failure
            del self._records[next(iter(self._records))]
        self._records[peer] = _Record(failures, due, reason)
        return due

    def succeeded(self, peer: PeerId) -> None:
        """Forget the failures with ``peer``."""
        self._records.pop(peer, None)

    def network_changed(self) -> None:
        """Forget all failures: what was impossible may be possible now."""
        self._records.clear()
