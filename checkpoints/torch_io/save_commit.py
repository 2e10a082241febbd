"""The part of a save that runs beside training: write, gather, commit, tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from checkpoints.manifest import FileEntry, Json, TensorEntry
from checkpoints.param_groups import merge_optimizers
from checkpoints.part_layout import FileLayout, part_record
from checkpoints.parts import Hook, WriterPart
from checkpoints.torch_io.exchange import (
    MAX_MESSAGE_BYTES,
    Exchange,
    as_fabric_error,
    bodies,
    done,
    failed,
)
from checkpoints.torch_io.save_agreement import Planned
from checkpoints.torch_io.save_files import Parent, write_files
from checkpoints.torch_io.staging import Staged
from checkpoints.writer import CheckpointWriter
from fabric.core.codec import Codec
from fabric.core.errors import FabricError, LocalProtocolError

OPTIMIZER_KEY = "optimizer"
"""The part of the state that ranks hold shares of: what optimizer_tensors returned."""


class Job(NamedTuple):
    """A staged save.

    Attributes:
        writer: Entered by rank 0, which commits with it.
        planned: What all agreed on.
        layouts: This rank's files.
        staged: Their bytes, or the error that kept us from staging them.
        parent: The step before, with which files may be shared.
        state: Everything that is not a tensor.
        rank_state: What of it differs between ranks.
        layout: The parallel layout, for people.
    """

    writer: CheckpointWriter
    planned: Planned
    layouts: list[FileLayout]
    staged: Staged | FabricError
    parent: Parent | None
    state: Mapping[str, Json]
    rank_state: Mapping[str, Json]
    layout: Mapping[str, Json]


class Saved(NamedTuple):
    """A committed save: its root, and the files this rank wrote."""

    root: str
    files: dict[str, FileEntry]


class _Contribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank tells the one that commits."""

    part: WriterPart
    state: dict[str, Json]
    optimizer: dict[str, Json]


_CODEC: Codec[_Contribution] = Codec(_Contribution, max_bytes=MAX_MESSAGE_BYTES)


def write_and_commit(job: Job, exchange: Exchange, on_point: Hook) -> Saved:
    """Return when the step is committed, on every rank.

    Raises:
        FabricError: a rank failed, the same on every rank; nothing is committed.
    """
    try:
        files, outcome = _write(job, f"rank{exchange.rank}", on_point)
        found = exchange.gather(outcome)
        reply = _commit(job, found) if exchange.rank == 0 else b""
        (root,) = bodies([exchange.scatter([reply] * exchange.world)])
        return Saved(root.decode(), files)
    finally:
        if exchange.rank == 0:
            job.writer.__exit__(None, None, None)


def _write(job: Job, writer: str, on_point: Hook) -> tuple[dict[str, FileEntry], bytes]:
    """Write this rank's files; return them, and the outcome to send."""
    try:
        if isinstance(job.staged, FabricError):
            raise job.staged
        files = write_files(
            job.writer.temporary, job.staged.files, job.parent, on_point
        )
        record = part_record(writer, job.layouts, files)
        on_point("part.written")
        return files, done(_CODEC.encode(_contribution(job, record)))
    except Exception as exc:  # noqa: BLE001  (sent to all ranks, which raise it)
        return {}, failed(as_fabric_error(exc))


def _contribution(job: Job, record: WriterPart) -> _Contribution:
    optimizer = job.state.get(OPTIMIZER_KEY, {})
    return _Contribution(record, dict(job.rank_state), dict(optimizer))


def _commit(job: Job, found: list[bytes]) -> bytes:
    """Commit what all ranks wrote; return the outcome to send."""
    try:
        told = [_CODEC.decode_untrusted(body) for body in bodies(found)]
        empty = {
            name: TensorEntry(held.dtype, held.shape, ())
            for name, held in job.planned.empty.items()
        }
        nobody = WriterPart("nobody", {}, empty)
        state = dict(job.state)
        if any(each.optimizer for each in told):
            state[OPTIMIZER_KEY] = merge_optimizers([e.optimizer for e in told])
        ranks = {str(k): each.state for k, each in enumerate(told) if each.state}
        if ranks:
            state["ranks"] = ranks
        root = job.writer.commit(
            [nobody, *(each.part for each in told)],
            state=state,
            aliases=job.planned.aliases,
            layout=job.layout,
            parent=job.parent.root if job.parent else "",
        )
        return done(root.encode())
    except FabricError as exc:
        return failed(exc)
    except ValueError as exc:
        return failed(LocalProtocolError(str(exc)))
