"""Storage for torch.distributed.checkpoint: save in the canonical format.

``dcp.save(state, storage_writer=CanonicalWriter("ckpt"))`` commits the next step of
``ckpt``; a path that ends in ``step-<n>`` names the step. Tensors go through the
planner as always. Other values are taken as objects and written as JSON; what JSON
cannot hold is refused: nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import override

from checkpoints.boxes import Box
from checkpoints.dcp_names import Path as ObjectPath
from checkpoints.dcp_names import canonical_names
from checkpoints.directories import list_steps, step_path
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import Json
from checkpoints.parts import PART_CODEC, ChunkSource, WriterPart, write_part
from checkpoints.torch_io.dcp_staging import StagedCopy
from checkpoints.torch_io.tensors import byte_view, dtype_name
from checkpoints.torch_io.training_state import encode
from checkpoints.writer import CheckpointWriter
from fabric.core.codec import Codec
from fabric.core.errors import ConfigError, LocalProtocolError

DCP_KEY = "dcp"
"""Where the manifest's state holds DCP's names, paths and values."""
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,15})")


class _RankPlan(msgspec.Struct, frozen=True):
    """What the coordinator tells a rank, in ``SavePlan.storage_data``."""

    directory: str
    step: int
    writer: str
    names: dict[str, str]


class _RankResult(msgspec.Struct, frozen=True):
    """What a rank tells the coordinator, in the first ``WriteResult``."""

    part: WriterPart
    values: dict[str, Json]


_PLANS: Codec[_RankPlan] = Codec(_RankPlan, max_bytes=PART_CODEC.max_bytes)
_RESULTS: Codec[_RankResult] = Codec(_RankResult, max_bytes=PART_CODEC.max_bytes)


class CanonicalWriter(StorageWriter, AsyncStager):
    """A StorageWriter, and the stager of ``dcp.async_save``: one copy, memory reused.

    Keep one writer for all saves of a program: the memory is reused, and what a save
    that failed on another rank has begun is ended by the next.

    Args:
        path: A directory of steps, or ``<directory>/step-<n>``.
        step: Number of the step; None = one after the newest, at each save.
        state: Further JSON for the manifest's state.

    Attributes:
        root: On the coordinator: root of the last committed step.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        state: Mapping[str, Json] | None = None,
    ) -> None:
        self._directory, self._step = _where(path, step)
        self._state = dict(state or {})
        self._writer: CheckpointWriter | None = None
        self._paths: dict[str, ObjectPath] = {}
        self._copy = StagedCopy()
        self.root = ""

    def __del__(self) -> None:
        if hasattr(self, "_writer"):
            self._abandon()

    @override
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is a path."""
        return isinstance(checkpoint_id, str | os.PathLike)

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, elsewhere if a path is given."""
        self._abandon()
        if checkpoint_id is not None:
            self._directory, self._step = _where(checkpoint_id, None)

    @override
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of ``state_dict`` in memory that the next save reuses."""
        return self._copy.stage(state_dict)

    @override
    def set_up_storage_writer(
        self,
        is_coordinator: bool,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Begin the step, on the coordinator.

        Raises:
            ConfigError: it exists, another process saves it, or ranks save apart.
        """
        if not kwargs.get("use_collectives", True):
            raise ConfigError(
                "a canonical checkpoint is one of all ranks",
                code="E_COLLECTIVES",
                next_step="save with use_collectives=True",
            )
        self._abandon()
        if is_coordinator:
            step = self._step
            if step is None:
                step = max(list_steps(self._directory), default=-1) + 1
            writer = CheckpointWriter(self._directory, step)
            writer.__enter__()
            self._writer = writer

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return ``plan`` as it is."""
        return plan

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank where to write, and under which names.

        Raises:
            ConfigError: the planner sent no plans because it keeps old ones, which
                name another step.
        """
        if not all(plan.usable for plan in plans):
            raise ConfigError(
                "plans kept by the planner name the step before",
                code="E_PLAN",
                next_step="use a planner without enable_plan_caching",
            )
        self._paths = {}
        for plan in plans:
            known = plan.planner_data if isinstance(plan.planner_data, dict) else {}
            for item in plan.items:
                fqn = item.index.fqn
                self._paths[fqn] = tuple(known.get(fqn, (fqn,)))
        names = canonical_names(self._paths)
        step = int(self._begun().path.name.removeprefix("step-"))
        told = []
        for rank, plan in enumerate(plans):
            mine = {item.index.fqn: names[item.index.fqn] for item in plan.items}
            where = str(self._directory.resolve())
            data = _PLANS.encode(_RankPlan(where, step, f"rank{rank}", mine))
            told.append(dataclasses.replace(plan, storage_data=data))
        return told

    @override
    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> Future[list[WriteResult]]:
        """Write this rank's files; the future is done on return.

        Raises:
            ConfigError: a value that JSON cannot hold, or the file system refused.
            ResourceExhausted: the disk is full.
        """
        try:
            results = self._write(plan, planner)
        except BaseException:
            self._abandon()  # torch tells nobody that a save has failed
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        told = _PLANS.decode_untrusted(plan.storage_data)
        values = {
            item.index.fqn: _value(item, planner)
            for item in plan.items
            if item.type == WriteItemType.BYTE_IO
        }
        sources = [
            _source(told.names[item.index.fqn], item, planner)
            for item in plan.items
            if item.type != WriteItemType.BYTE_IO
        ]
        temporary = step_path(Path(told.directory), told.step).with_suffix(".tmp")
        part = write_part(temporary, told.writer, sources)
        sent = _RESULTS.encode(_RankResult(part, values))
        results = [WriteResult(MetadataIndex("part"), len(sent), sent)]
        results += [
            WriteResult(item.index, item.tensor_storage_size() or 0, b"")
            for item in plan.items
        ]
        return results

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the step, on the coordinator."""
        told = [_RESULTS.decode_untrusted(rank[0].storage_data) for rank in results]
        values = {fqn: v for each in told for fqn, v in each.values.items()}
        dcp = {
            "names": canonical_names(self._paths),
            "paths": {fqn: list(path) for fqn, path in self._paths.items()},
            "values": values,
        }
        writer = self._begun()
        try:
            self.root = writer.commit(
                [each.part for each in told],
                state={**self._state, DCP_KEY: dcp},
                layout={"world": len(results)},
            )
        finally:
            self._abandon()

    def _begun(self) -> CheckpointWriter:
        if self._writer is None:
            raise LocalProtocolError("no save has begun on this rank")
        return self._writer

    def _abandon(self) -> None:
        """End the step that was begun; removes it unless it is committed."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(None, None, None)


def _where(path: str | os.PathLike[str], step: int | None) -> tuple[Path, int | None]:
    """Return the directory of steps, and the step if one is named."""
    named = _STEP.fullmatch(Path(path).name)
    if named is None:
        return Path(path), step
    if step not in (None, int(named.group(1))):
        raise ValueError(f"{path} is not step {step}")
    return Path(path).parent, int(named.group(1))


def _value(item: WriteItem, planner: SavePlanner) -> Json:
    """Return a value as JSON, taken before the planner makes a pickle of it."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise ConfigError(
            f"{type(planner).__qualname__} has no lookup_object: values cannot be "
            "taken as objects",
            code="E_PLANNER",
            next_step="derive the planner from DefaultSavePlanner",
        )
    return encode(lookup(item.index), item.index.fqn)


def _source(name: str, item: WriteItem, planner: SavePlanner) -> ChunkSource:
    data = item.tensor_data
    if data is None:
        raise LocalProtocolError(f"{name!r}: a tensor item without a tensor")
    dtype = dtype_name(data.properties.dtype)
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))

    def read() -> Sequence[Buffer]:
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor):
            raise LocalProtocolError(f"{name!r}: the planner gave no tensor")
        if dtype_name(tensor.dtype) != dtype or tuple(tensor.shape) != box.sizes:
            raise ConfigError(
                f"{name!r}: planned as {dtype} {list(box.sizes)}, but is "
                f"{tensor.dtype} {list(tensor.shape)}",
                code="E_PLAN",
                next_step="let the planner plan what resolve_data returns",
            )
        whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return (byte_view(whole),)

    return ChunkSource(name, dtype, tuple(data.size), box, read)
