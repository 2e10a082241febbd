"""Checkpoints of a job that is not over, for when nobody holds its state any more."""

from __future__ import annotations

import io
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from checkpoints.reader import CheckpointReader
from fabric.core.ids import JobId, PeerId
from fabric.jobs.spec import JobSpec, ModelSpec
from training.resumption import MODEL, MOMENTUM, parameter_shapes


class SavedState(NamedTuple):
    """A checkpoint that is here now.

    Attributes:
        path: Its directory; where no wanted tensor lies, its files may have holes.
        round: The round that it starts.
        root: Its content root.
    """

    path: Path
    round: int
    root: str


class SavedStates(Protocol):
    """Checkpoints by their heads."""

    def rounds(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> Collection[int]:
        """Return the rounds of which there are checkpoints of ``job``."""
        ...

    def opened(
        self, job: JobId, spec: JobSpec, participants: tuple[PeerId, ...]
    ) -> AbstractAsyncContextManager[SavedState]:
        """Have the newest that can be had here while inside.

        Raises:
            FabricError: none can be had.
        """
        ...


def copy_state(path: Path, model: ModelSpec, file: io.FileIO) -> None:
    """Write the state in the checkpoint at ``path`` as workers hash it. Blocking.

    Parameters then momentum, each in the order of the names; every byte is verified
    against the checkpoint's manifest.

    Raises:
        IntegrityError: a byte is damaged.
    """
    names = sorted(parameter_shapes(model))
    with CheckpointReader(path) as reader:
        for prefix in (MODEL, MOMENTUM):
            for name in names:
                for window in reader.windows(prefix + name):
                    _write_all(file, memoryview(window).cast("B"))


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
