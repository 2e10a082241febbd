"""Write torch distributed checkpoints, as one rank would have saved them.

Each tensor is one chunk. Aliases (tied weights) are two names of one place, which torch
reads as two tensors; torch itself would store them twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from checkpoints.formats import dcp_index as names
from checkpoints.formats.dcp_index import METADATA_NAME, Place
from checkpoints.formats.pickle_values import TORCH_NAMES, Global
from checkpoints.formats.pickle_writer import Call, Instance, Pairs, pickled
from checkpoints.formats.sink import (
    Bundle,
    OutTensor,
    Plan,
    PlannedFile,
    SinkOptions,
)
from checkpoints.formats.state_leaves import EmptyDict, leaves
from checkpoints.formats.state_leaves import Path as StatePath
from checkpoints.formats.state_names import nested_state
from checkpoints.formats.torch_zip_writer import (
    NewArchive,
    NewEntry,
    tensor_call,
    whole_tensor,
)
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import FileEntry
from fabric.core.errors import ConfigError

VERSION = "1.0.0"


class _Item(msgspec.Struct, frozen=True):
    """An archive to be written, and what it holds."""

    key: str
    tensor: OutTensor | None
    archive: NewArchive


class DcpSink:
    """See :class:`checkpoints.formats.sink.Sink`."""

    format = "dcp"

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """Return what would be written.

        Raises:
            ConfigError: two things would get one flat name.
        """
        paths: dict[str, StatePath] = {}
        items: dict[str, _Item] = {}  # by tensor's name or flat name
        where: dict[str, str] = {}
        found: dict[str, object] = {}
        for path, value in leaves(nested_state(bundle)):
            flat = ".".join(map(str, path))
            if flat in ("", "model") and isinstance(value, EmptyDict):
                continue  # there is none
            if flat in paths:
                raise ConfigError(
                    f"two things would be called {flat[:200]!r}",
                    code="E_NAME",
                    next_step="rename one of them",
                )
            paths[flat] = path
            found[flat] = value
            where[flat] = value.name if isinstance(value, OutTensor) else f"\0{flat}"
            if where[flat] not in items:
                items[where[flat]] = _item(where[flat], value)
        files, places = _files(list(items.values()), options.max_shard_bytes)
        index = pickled(_metadata(found, paths, where, places))

        def finish(directory: Path, _: Mapping[str, FileEntry]) -> None:
            with (directory / METADATA_NAME).open("xb") as file:
                file.write(index)
                file.flush()
                os.fsync(file.fileno())

        return Plan(files, finish)


def _item(key: str, value: object) -> _Item:
    if not isinstance(value, OutTensor):
        data = {} if isinstance(value, EmptyDict) else value
        return _Item(key, None, NewArchive(data, ()))
    ref = whole_tensor("0", value.dtype, value.shape, value.size_bytes)
    entry = NewEntry("0", value.size_bytes, value.read)
    return _Item(key, value, NewArchive(tensor_call(ref), [entry]))


def _files(
    items: Sequence[_Item], max_bytes: int
) -> tuple[list[PlannedFile], dict[str, Place]]:
    """Put the items into files, in order; objects come first, as torch has them."""
    groups: list[list[_Item]] = []
    size = 0
    for item in sorted(items, key=lambda each: each.tensor is not None):
        if not groups or size + item.archive.size > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.archive.size
    files: list[PlannedFile] = []
    places: dict[str, Place] = {}
    for number, group in enumerate(groups):
        name = f"__0_{number}.distcp"
        at = 0
        for item in group:
            places[item.key] = Place(name, at, item.archive.size)
            at += item.archive.size
        tensors = tuple(item.tensor.name for item in group if item.tensor)
        files.append(PlannedFile(name, tensors, at, _Chunks(group)))
    return files, places


class _Chunks:
    """The bytes of a file: one archive after another."""

    def __init__(self, group: Sequence[_Item]) -> None:
        self._group = group

    def __call__(self) -> Iterator[Buffer]:
        for item in self._group:
            yield from item.archive.chunks()


def _metadata(
    found: Mapping[str, object],
    paths: Mapping[str, StatePath],
    where: Mapping[str, str],
    places: Mapping[str, Place],
) -> Instance:
    return Instance(
        names.METADATA,
        {
            "state_dict_metadata": {
                flat: _described(value) for flat, value in found.items()
            },
            "planner_data": dict(paths),
            "storage_data": Pairs(
                [
                    (_index(flat, value), _stored(places[where[flat]]))
                    for flat, value in found.items()
                ]
            ),
            "storage_meta": Instance(
                names.STORAGE_META,
                {"checkpoint_id": None, "save_id": None, "load_id": None}
                | {"modules": []},
            ),
            "version": VERSION,
        },
    )


def _described(value: object) -> Instance:
    if not isinstance(value, OutTensor):
        return Instance(names.OBJECT, {})
    properties = Instance(
        names.PROPERTIES,
        (
            Global("torch", TORCH_NAMES[value.dtype]),
            Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
            False,
            Call(names.MEMORY_FORMAT, (0,)),
            False,
        ),
    )
    begin = (0,) * len(value.shape)
    chunk = {"offsets": _size(begin), "sizes": _size(value.shape)}
    return Instance(
        names.TENSOR,
        {
            "properties": properties,
            "size": _size(value.shape),
            "chunks": [Instance(names.CHUNK, chunk)],
        },
    )


def _index(flat: str, value: object) -> Instance:
    state: dict[str, object] = {"fqn": flat, "index": None}
    if isinstance(value, OutTensor):
        state |= {"index": 0, "offset": _size((0,) * len(value.shape))}
    return Instance(names.INDEX, state)


def _stored(place: Place) -> Instance:
    return Instance(
        names.STORAGE_INFO,
        {"relative_path": place.file, "offset": place.offset, "length": place.length},
    )


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (sizes,))
