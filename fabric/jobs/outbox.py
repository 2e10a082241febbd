"""What must reach which peer: the latest message per slot, until it is answered.

A slot is (peer, name), for instance ("...abc", "report"). Putting a message replaces
the one that waits there, so the outbox is bounded by peers times names, and a peer that
was cut off gets the newest of each kind, not a history.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.ids import PeerId
from fabric.jobs.messages import JobMessage

Slot = tuple[PeerId, str]

SOON = 0.3
"""Share of the usual pause after a call that was refused at once, hence was cheap."""


@dataclass
class _Waiting:
    message: JobMessage
    due: float
    in_flight: bool = False


class Outbox:
    """Latest message per slot, re-sent after ``retry_seconds`` until answered."""

    def __init__(self, retry_seconds: float) -> None:
        self._retry = retry_seconds
        self._slots: dict[Slot, _Waiting] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing waits or is in flight."""
        return not self._slots

    def put(self, peer: PeerId, name: str, message: JobMessage, now: float) -> None:
        """Send ``message`` to ``peer``, instead of what waits under ``name``."""
        self._slots[peer, name] = _Waiting(message, now)

    def drop(self, peer: PeerId, name: str) -> None:
        """Forget the message under ``name``."""
        self._slots.pop((peer, name), None)

    def clear(self) -> None:
        """Forget everything."""
        self._slots.clear()

    def keep(self, peers: frozenset[PeerId]) -> None:
        """Forget messages to anybody but ``peers``."""
        self._slots = {k: v for k, v in self._slots.items() if k[0] in peers}

    def take(self, now: float) -> list[tuple[PeerId, JobMessage]]:
        """Return what is to be sent now; each is in flight until told otherwise."""
        out = []
        for (peer, _), waiting in self._slots.items():
            if not waiting.in_flight and waiting.due <= now:
                waiting.in_flight = True
                out.append((peer, waiting.message))
        return out

    def answered(self, peer: PeerId, message: JobMessage) -> None:
        """``peer`` took ``message``: its slot is free."""
        for slot, waiting in self._slots.items():
            if slot[0] == peer and waiting.message is message:
                del self._slots[slot]
                return

    def failed(
        self, peer: PeerId, message: JobMessage, now: float, *, soon: bool = False
    ) -> None:
        """``message`` did not reach ``peer``: send again after a while, or ``soon``."""
        for slot, waiting in self._slots.items():
            if slot[0] == peer and waiting.message is message:
                waiting.in_flight = False
                waiting.due = now + self._retry * (SOON if soon else 1.0)

    def next_timeout(self) -> float | None:
        """Return when :meth:`take` has something, or None."""
        return min(
            (w.due for w in self._slots.values() if not w.in_flight), default=None
        )
