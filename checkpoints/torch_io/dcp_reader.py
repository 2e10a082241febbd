"""Storage for torch.distributed.checkpoint: load from the canonical format.

``dcp.load(state, storage_reader=CanonicalReader("ckpt"))`` fills ``state`` in place
from any canonical checkpoint, whoever wrote it: DCP's metadata is rebuilt from our
manifest. Each touched block is verified; no element type is converted unless asked for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future
from typing_extensions import override

from checkpoints.boxes import Box
from checkpoints.dcp_names import dotted, nested_path
from checkpoints.manifest import Chunk, Json, TensorEntry
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.dcp_writer import DCP_KEY
from checkpoints.torch_io.loader import Target, fill
from checkpoints.torch_io.tensors import DTYPES, dtype_name
from checkpoints.torch_io.training_state import decode
from fabric.core.errors import ConfigError, IntegrityError

_PathOf = dict[str, tuple[str | int, ...]]


class CanonicalReader(StorageReader):
    """A StorageReader.

    Args:
        path: A step's directory, or the directory whose ``latest`` names one.
        root: Root id that the checkpoint must have, or empty.
        section: Such as "model/": only names that begin with it, without it: for a
            state_dict that is not nested.
        cast: Convert element types as ``Tensor.copy_`` does.
        threads: Readers; 0 = one per processor, at most four.

    Raises:
        ConfigError: there is no checkpoint.
        IntegrityError: its manifest is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str = "",
        section: str = "",
        cast: bool = False,
        threads: int = 0,
    ) -> None:
        self._root = root
        self._section = section
        self._cast = cast
        self._threads = threads
        self._open(Path(path))

    @override
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is a path."""
        return isinstance(checkpoint_id, str | os.PathLike)

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load, from elsewhere if a path is given."""
        if checkpoint_id is not None:
            self._open(Path(checkpoint_id))

    @property
    def state(self) -> Mapping[str, Json]:
        """Everything in the manifest that is not a tensor."""
        return self._state

    @override
    def read_metadata(self) -> Metadata:
        """Return DCP's metadata of this checkpoint."""
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            fqn: BytesStorageMetadata() for fqn in self._values
        }
        with self._reader() as reader:
            for fqn, name in self._names.items():
                found[fqn] = _metadata(reader.entry(name))
        return Metadata(found, planner_data=self._paths)

    @override
    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Do nothing: what is needed is known."""

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return ``plan`` as it is."""
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return ``plans`` as they are."""
        return plans

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for; the future is done on return.

        Raises:
            ConfigError: an element type differs (``E_DTYPE``).
            IntegrityError: a touched block is damaged.
        """
        with self._reader() as reader:
            wanted: list[tuple[ReadItem, Target]] = []
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    fqn = item.storage_index.fqn
                    _put(planner, item, self._values[fqn])
                else:
                    wanted.append((item, self._target(reader, item, planner)))
            fill(reader, [target for _, target in wanted], self._threads)
            for item, target in wanted:
                planner.commit_tensor(item, target.view)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _open(self, path: Path) -> None:
        with CheckpointReader(path, root=self._root) as reader:
            # one step for all that follows, even if ``latest`` moves meanwhile
            self._path, self._opened = reader.path, reader.root
            self._state = reader.state
            told = reader.state.get(DCP_KEY)
            if self._section or not isinstance(told, dict):
                self._derive(reader)
            else:
                self._take(reader, told)

    def _reader(self) -> CheckpointReader:
        return CheckpointReader(self._path, root=self._opened)

    def _take(self, reader: CheckpointReader, told: Mapping[str, Json]) -> None:
        """Use the names and paths that DCP had when it saved."""
        try:
            self._paths: _PathOf = {
                str(fqn): tuple(path) for fqn, path in told["paths"].items()
            }
            self._values: dict[str, object] = {
                str(fqn): decode(value) for fqn, value in told["values"].items()
            }
            names = {str(k): str(v) for k, v in told["names"].items()}
            self._names = {k: v for k, v in names.items() if k not in self._values}
            known = set(reader.names())
            if not known >= set(self._names.values()) or not names.keys() <= set(
                self._paths
            ):
                raise KeyError("names")
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise IntegrityError(
                f"{reader.path}: DCP's names in the state are damaged", code="E_STATE"
            ) from exc

    def _derive(self, reader: CheckpointReader) -> None:
        """Give our names the names that DCP would have given."""
        self._names, self._paths, self._values = {}, {}, {}
        for name in reader.names():
            if name.startswith(self._section):
                bare = name.removeprefix(self._section)
                path = (bare,) if self._section else nested_path(name)
                self._names[dotted(path)] = name
                self._paths[dotted(path)] = path
        optimizer = reader.state.get("optimizer")
        if not self._section and isinstance(optimizer, dict):
            flat, paths = flatten_state_dict({"optimizer": decode(optimizer)})
            for fqn in flat.keys() - self._names.keys():
                self._paths[fqn] = tuple(paths[fqn])
                self._values[fqn] = flat[fqn]

    def _target(
        self, reader: CheckpointReader, item: ReadItem, planner: LoadPlanner
    ) -> Target:
        name = self._names[item.storage_index.fqn]
        entry = reader.entry(name)
        begin = _chunk(entry, item.storage_index).offsets
        offsets = tuple(a + b for a, b in zip(begin, item.storage_offsets, strict=True))
        view = planner.resolve_tensor(item).detach()
        if dtype_name(view.dtype) != entry.dtype and not self._cast:
            raise ConfigError(
                f"{name!r}: stored as {entry.dtype}, wanted {view.dtype}",
                code="E_DTYPE",
                next_step="read with CanonicalReader(..., cast=True) to convert",
            )
        return Target(entry, Box(offsets, tuple(item.lengths)), view)


def _metadata(entry: TensorEntry) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
        for c in entry.chunks
    ]
    properties = TensorProperties(dtype=DTYPES[entry.dtype])
    return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


def _chunk(entry: TensorEntry, index: MetadataIndex) -> Chunk:
    offsets = tuple(index.offset or ())
    hint = index.index
    likely = entry.chunks[hint : hint + 1] if hint is not None else ()
    for chunk in (*likely, *entry.chunks):
        if chunk.offsets == offsets:
            return chunk
    raise ValueError(f"{index.fqn!r}: no chunk at {offsets}")


def _put(planner: LoadPlanner, item: ReadItem, value: object) -> None:
    """Put a value where it belongs, without a pickle if the planner is torch's own."""
    own = type(planner).load_bytes is DefaultLoadPlanner.load_bytes
    if not own or not isinstance(planner, DefaultLoadPlanner):
        data = io.BytesIO()  # of a value that we made from JSON, for this call only
        torch.save(value, data)
        data.seek(0)
        planner.load_bytes(item, data)
    elif planner.flatten_state_dict:
        path = planner.mappings[item.dest_index.fqn]
        set_element(planner.original_state_dict, path, value)
    else:
        planner.state_dict[item.dest_index.fqn] = value
