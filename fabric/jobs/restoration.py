"""Getting a job's lost state back from a checkpoint, as the peer that proposes. Pure.

A campaign finds that nobody holds a state although the job has a checkpoint; it is lost
(``proposer.STATE_LOST``), and the proposer has the checkpoint brought here. Then it
holds that state, and the next campaign starts from it as from any held one. While the
checkpoint cannot be had the job waits: it starts anew only where none was ever written.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.jobs.promises import Held
from fabric.jobs.states import Pause

RETRY_PATIENCES = 2
"""Pause before a checkpoint that could not be had is asked for again, in patiences."""


@dataclass(frozen=True)
class Restored:
    """The state of checkpoint ``root`` is kept here now."""

    held: Held
    root: str


class Restoration:
    """One peer's attempts for one job, one at a time.

    Args:
        first: The round that the initial state starts.
        patience: Seconds, the spec's one knob.
    """

    def __init__(self, first: int, patience: float) -> None:
        self._first, self._patience = first, patience
        self.checkpoint = 0
        """The round of the job's newest checkpoint, as far as we know; 0: none."""
        self.reached = 0
        """The round that the job had reached, as far as we know."""
        self.pause: Pause | None = None
        self._running, self._due = False, float("-inf")
        self._outcome: Restored | Pause | None = None

    @property
    def possible(self) -> bool:
        """Whether a checkpoint says more than the initial state does."""
        return self.checkpoint > self._first

    def know(self, checkpoint: int, reached: int) -> None:
        """Take what the replicated state says."""
        self.checkpoint = checkpoint
        self.reached = max(self.reached, reached)

    def begin(self, now: float) -> bool:
        """Return whether to bring the checkpoint here now."""
        if self._running or now < self._due:
            return False
        self._running = True
        self.pause = Pause(
            "state_lost",
            f"nobody holds the job's state; getting its checkpoint of round "
            f"{self.checkpoint}",
            "fabric logs JOB says when it goes on",
        )
        return True

    def ended(self, outcome: Restored | Pause) -> None:
        """The attempt is over; :meth:`take` hands it on."""
        self._outcome = outcome

    def take(self, now: float) -> Restored | Pause | None:
        """Return how the attempt ended, once."""
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return None
        self._running = False
        self._due = now + RETRY_PATIENCES * self._patience
        self.pause = outcome if isinstance(outcome, Pause) else None
        return outcome
