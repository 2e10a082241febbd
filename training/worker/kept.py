"""The states that a worker keeps, written for others and taken from files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fabric.core.errors import IntegrityError
from fabric.jobs.spec import JobSpec
from training.messages import Event, HotFailed, SaveFailed
from training.worker.trainer import Trainer
from training.worker.writer import HotOrder, SaveOrder, StateWriter, read_all


class KeptStates:
    """Obeys the daemon's orders about states; main thread only.

    Args:
        spec: The job's.
        trainer: Keeps the states.
        tell: Sends an event to the daemon; callable from any thread.
    """

    def __init__(
        self, spec: JobSpec, trainer: Trainer, tell: Callable[[Event], None]
    ) -> None:
        self._trainer, self._tell = trainer, tell
        self._writer = StateWriter(spec, trainer.engine, tell)

    def save(self, directory: Path, at: int) -> None:
        """Write the start state of round ``at`` as a checkpoint, in the background."""
        state = self._trainer.state_of(at)
        if state is None:
            reason = f"the state of round {at} is not kept here any more"
            self._tell(SaveFailed(str(directory), "E_NO_STATE", reason))
            return
        self._writer.put(SaveOrder(directory, state))

    def write_hot(self, digest: str, fd: int) -> None:
        """Write the state called ``digest`` into the file ``fd``, in the background."""
        served = self._trainer.served(digest)
        if served is None:
            os.close(fd)
            self._tell(HotFailed(digest, "not kept here any more"))
            return
        self._writer.put(HotOrder(digest, served.data, fd))

    def load_hot(self, at: int, digest: str, fd: int) -> None:
        """Keep the state in the file ``fd``; a generation is about to name it."""
        try:
            data = read_all(fd, self._trainer.state_bytes)
            self._trainer.keep(at, digest, data)
        except (IntegrityError, OSError) as exc:
            self._tell(HotFailed(digest, str(exc)[:500]))
        finally:
            os.close(fd)
