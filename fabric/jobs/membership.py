"""Does this peer want a place in a job's next generation? Joining, leaving, failing.

A peer asks until a generation lists it: once per patience, and sooner when it learns of
another coordinator than the one it asked, or when that one refused. After a failed
worker it waits, longer each time, and asks again; after MAX_WORKER_FAILURES it leaves
the job to others.
"""

from __future__ import annotations

from fabric.core.ids import PeerId

MAX_WORKER_FAILURES = 3
"""After so many failed workers this peer no longer asks to take part."""
REFUSED = 0.25
"""Share of a patience until a peer asks again that was refused: who takes over a job
refuses until it has."""


class Membership:
    """One peer's wish to take part in one job.

    Args:
        patience: Seconds, the spec's one knob.
        now: Monotonic seconds.
    """

    def __init__(self, patience: float, now: float) -> None:
        self._patience = patience
        self._due = now
        self._failures = 0
        self.joins = False
        self.leaving = False
        self.hint: PeerId | None = None
        self._asked: PeerId | None = None
        self.failure = ""
        """Why the last worker failed, or empty."""

    @property
    def gave_up(self) -> bool:
        """Whether too many workers failed here."""
        return self._failures >= MAX_WORKER_FAILURES

    def wish(self, joins: bool, hint: PeerId | None, now: float) -> None:
        """Set whether we want to take part, and whom to ask if we know better.

        Whoever asked one that is gone must not wait for it: a short job would be over.
        """
        self.hint = hint
        moved = None not in (hint, self._asked) and hint != self._asked
        if joins and (moved or not self.joins):
            self._due = now
        self.joins = joins

    def leave(self) -> None:
        """We want to be left out, of this generation and of later ones."""
        self.leaving, self.joins = True, False

    @property
    def may_rejoin(self) -> bool:
        """Whether a worker that failed is the first one: a new one is tried at once."""
        return self._failures <= 1 and self.joins

    def worker_failed(self, reason: str, now: float) -> None:
        """A worker failed: ask for a place again, but later each time."""
        self.leaving, self._asked = False, None
        self.failure = reason
        self._failures += 1
        if self.gave_up:
            self.joins = False
        self._due = now + self._patience * 2**self._failures / 4

    def hurry(self, now: float) -> None:
        """A coordinator that waits for us is heard: ask at once."""
        if self.joins:
            self._due = min(self._due, now)

    def asked(self, peer: PeerId, now: float) -> None:
        """We asked ``peer``; ask again after a patience."""
        self._asked, self._due = peer, now + self._patience

    def refused(self, peer: PeerId, now: float) -> None:
        """``peer`` answered that it gives no places."""
        if peer == self._asked:
            self._due = min(self._due, now + REFUSED * self._patience)

    def asks(self, now: float, *, placed: bool, has_state: bool) -> bool:
        """Return whether to ask for a place now.

        Args:
            now: Monotonic seconds.
            placed: Whether a generation that acts lists us.
            has_state: Whether our worker holds a state: false once it failed.
        """
        if not self.joins or now < self._due:
            return False
        return not placed or (self._failures > 0 and not has_state)
