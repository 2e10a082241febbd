"""Save while training goes on: one copy, then a thread hashes, writes and commits.

::

    with Saver(directory) as saver:           # on every rank
        for step in range(steps):
            ...
            saver.save(step, tensors, state)  # returns after the copy
        root = saver.wait()

``save`` agrees with the other ranks on who writes what, copies this rank's share into
memory that is used again, and returns. A failure of the rest, on any rank, is raised by
the next ``save`` or by ``wait``, on every rank. Rank 0 commits the step when the files
of all ranks are on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

import msgspec

from checkpoints.manifest import Json, check_json
from checkpoints.part_layout import FileLayout
from checkpoints.parts import MAX_FILE_BYTES, Hook, no_hook
from checkpoints.retention import Retention, apply_retention
from checkpoints.torch_io.exchange import Exchange, as_fabric_error, default_exchange
from checkpoints.torch_io.frozen import FileGroups
from checkpoints.torch_io.pieces import Value
from checkpoints.torch_io.save_agreement import Agreement
from checkpoints.torch_io.save_commit import Job, write_and_commit
from checkpoints.torch_io.save_files import Parent, parent_on_disk
from checkpoints.torch_io.staging import Staged, Stager
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError, FabricError, ResourceExhausted


class SaverConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How steps are saved.

    Attributes:
        retention: Which steps stay.
        share_unchanged: Link files of which no byte changed to the step before.
        refuse_when_busy: Refuse a save while one is in flight, instead of waiting.
        max_file_bytes: A rank starts another file above this.
    """

    retention: Retention = Retention()
    share_unchanged: bool = True
    refuse_when_busy: bool = False
    max_file_bytes: int = MAX_FILE_BYTES


class Saver:
    """Saves steps into one directory; at most one is in flight.

    Making one is a collective call if torch.distributed is initialised and no exchange
    is given. Leaving the block waits for the save in flight and raises its error.

    Args:
        directory: Holds the steps; all ranks see the same one.
        config: See :class:`SaverConfig`.
        exchange: How the ranks talk; None = torch.distributed, if it is initialised.
        frozen: Says of a name whether its tensor is not expected to change; others
            are found by comparing with the save before.
        on_point: Told each point of a save (tests kill the process there).

    Attributes:
        retention_error: Why old steps could not be deleted after a save, or None; the
            save itself is committed.
    """

    def __init__(
        self,
        directory: Path,
        config: SaverConfig | None = None,
        *,
        exchange: Exchange | None = None,
        frozen: Callable[[str], bool] | None = None,
        on_point: Hook = no_hook,
    ) -> None:
        self._directory = directory
        self._config = config or SaverConfig()
        self._exchange = exchange or default_exchange()
        self._on_point = on_point
        self._agreement = Agreement(self._exchange)
        self._groups = FileGroups(
            f"rank{self._exchange.rank}",
            frozen or (lambda _: False),
            self._config.max_file_bytes,
        )
        self._stager = Stager(compare=self._config.share_unchanged)
        self._parent: Parent | None = None
        self._thread: Thread | None = None
        self._error: FabricError | None = None
        self._root = ""
        self.retention_error: FabricError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._join()
        if error is None:
            self.wait()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Value],
        state: Mapping[str, Json] | None = None,
        *,
        rank_state: Mapping[str, Json] | None = None,
        layout: Mapping[str, Json] | None = None,
    ) -> None:
        """Save a step; return when the tensors may change again.

        Args:
            step: Its number; it must not exist.
            tensors: What this rank holds, by canonical name (``model/<fqn>``). What
                several ranks hold is written by one of them.
            state: Everything else, as JSON; rank 0's counts, but for "optimizer" (see
                ``optimizer_tensors``), of which each rank may hold a share.
            rank_state: What differs between ranks (dataloader position), as JSON: it
                becomes ``state["ranks"][<rank>]``.
            layout: The parallel layout, for people; rank 0's counts.

        Raises:
            FabricError: the save before failed, or this one cannot begin: on every
                rank, and nothing is left of it.
        """
        if self._config.refuse_when_busy and self._thread and self._thread.is_alive():
            raise ResourceExhausted(
                "a save is in flight",
                code="E_SAVE_BUSY",
                next_step="save less often, or let save() wait",
            )
        self.wait()
        writer = CheckpointWriter(self._directory, step, on_point=self._on_point)
        planned, held = self._agreement.begin(writer, tensors)
        layouts: list[FileLayout] = []
        staged: Staged | FabricError = ConfigError("interrupted", code="E_INTERRUPTED")
        try:
            for value in (state, rank_state, layout):
                _check_state(value or {})
            layouts = self._groups.layouts(planned, held)
            staged = self._stager.stage(layouts, lambda n, box: held[n].view(box))
        except Exception as exc:  # noqa: BLE001  (wait() raises it, on every rank)
            staged = as_fabric_error(exc)
        finally:  # whatever happened here, the other ranks wait for our word
            job = Job(
                writer,
                planned,
                layouts,
                staged,
                self._parent,
                state or {},
                rank_state or {},
                {"world": self._exchange.world, **(layout or {})},
            )
            self._thread = Thread(target=self._finish, args=(job,), name="checkpoint")
            self._thread.start()
        self._on_point("staged")

    def wait(self) -> str:
        """Wait for the save in flight; return the root of the last one, or "".

        Raises:
            FabricError: it failed, here or on another rank; nothing was committed.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._root

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(self, job: Job) -> None:
        """Do what :meth:`save` left; the thread."""
        try:
            if job.parent is None:  # the first save, or one after a failure
                job = job._replace(parent=parent_on_disk(self._directory))
            saved = write_and_commit(job, self._exchange, self._on_point)
        except Exception as exc:  # noqa: BLE001  (wait() raises it)
            self._stager.forget()
            self._parent = None
            self._error = as_fabric_error(exc)
            return
        self._root = saved.root
        self._parent = Parent(job.writer.path, saved.root, saved.files, staged=True)
        if isinstance(job.staged, Staged):
            self._groups.learn(job.staged)
        if self._exchange.rank == 0:
            self._retain()

    def _retain(self) -> None:
        try:
            apply_retention(self._directory, self._config.retention)
            self.retention_error = None
        except FabricError as exc:
            self.retention_error = exc


def _check_state(value: Mapping[str, Json]) -> None:
    try:
        check_json(dict(value))
    except ValueError as exc:
        raise ConfigError(
            f"state: {exc}",
            code="E_NOT_JSON",
            next_step="save it as a tensor, or through typed_json.to_json",
        ) from exc
