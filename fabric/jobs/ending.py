"""How a job stands as one peer knows it, and how its end is told."""

from __future__ import annotations

from typing import Literal

from fabric.core.ids import JobId
from fabric.jobs.effects import Fact
from fabric.jobs.messages import Finished
from fabric.jobs.states import JobState, Trigger, advance, is_over

END: dict[JobState, Literal["done", "failed", "cancelled"]] = {
    JobState.DONE: "done",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


class Outcome:
    """State of a job, and why it ended if it did."""

    def __init__(self, job: JobId, state: JobState) -> None:
        self._job = job
        self.state = state
        self.reason = ""

    @property
    def over(self) -> bool:
        """Whether the job ended."""
        return is_over(self.state)

    def started(self) -> None:
        """A generation takes part."""
        self.state = advance(self.state, Trigger.STARTED)

    def adopt(self, state: JobState, reason: str) -> bool:
        """Learn that the job ended in ``state``; False when that is no news."""
        if self.over or not is_over(state):
            return False
        self.state, self.reason = state, reason
        return True

    def finished(self, counter: int, facts: dict[str, Fact]) -> Finished:
        """Return the message that tells others of the end, at epoch ``counter``."""
        return Finished(self._job, counter, END[self.state], self.reason[:500], facts)
