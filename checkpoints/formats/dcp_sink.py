"""Write torch distributed checkpoints, as one rank would have saved them, or several.

Each tensor is one chunk, or as many as ranks share it. Aliases (tied weights) are two
names of one place, which torch reads as two tensors; torch itself stores them twice.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from checkpoints.boxes import Box, whole
from checkpoints.cuts import Cut
from checkpoints.dtypes import tensor_bytes
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
from fabric.core.errors import ConfigError, LocalProtocolError

VERSION = "1.0.0"


class _Item(msgspec.Struct, frozen=True):
    """An archive to be written: an object, or a rank's box of a tensor."""

    key: str
    tensor: OutTensor | None
    archive: NewArchive
    box: Box = Box((), ())
    rank: int = 0


class DcpSink:
    """See :class:`checkpoints.formats.sink.Sink`."""

    format = "dcp"
    takes_cut = True

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """Return what would be written.

        Raises:
            ConfigError: two things would get one flat name.
        """
        paths: dict[str, StatePath] = {}
        items: dict[str, list[_Item]] = {}  # by tensor's name or flat name
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
                items[where[flat]] = _items(where[flat], value, options.cut)
        every = [item for several in items.values() for item in several]
        files, places = _files(every, options.max_shard_bytes)
        index = pickled(_metadata(found, paths, where, places))

        def finish(directory: Path, _: Mapping[str, FileEntry]) -> None:
            with (directory / METADATA_NAME).open("xb") as file:
                file.write(index)
                file.flush()
                os.fsync(file.fileno())

        return Plan(files, finish)


def _items(key: str, value: object, cut: Cut | None) -> list[_Item]:
    if not isinstance(value, OutTensor):
        data = {} if isinstance(value, EmptyDict) else value
        return [_Item(key, None, NewArchive(data, ()))]
    if cut is None:
        return [_boxed(key, value, 0, whole(value.shape))]
    shares = cut.shares(value.name, value.shape)
    return [_boxed(key, value, rank, box) for rank, box in shares]


def _boxed(key: str, tensor: OutTensor, rank: int, box: Box) -> _Item:
    """Return the archive of a box of a tensor."""
    size = tensor_bytes(tensor.dtype, box.sizes)
    ref = whole_tensor("0", tensor.dtype, box.sizes, size)
    read = tensor.read
    if box != whole(tensor.shape):
        if tensor.read_box is None:
            raise LocalProtocolError(f"{tensor.name!r} cannot be read in boxes")
        read = partial(tensor.read_box, box)
    archive = NewArchive(tensor_call(ref), [NewEntry("0", size, read)])
    return _Item(key, tensor, archive, box, rank)


_Places = dict[str, list[tuple[Box, Place]]]
"""Where the chunks of a tensor, or the one object, of each key are."""


def _files(items: Sequence[_Item], max_bytes: int) -> tuple[list[PlannedFile], _Places]:
    """Put the items into files of ranks; objects come first, as torch has them."""
    groups: dict[int, list[list[_Item]]] = defaultdict(list)
    size = 0
    for item in sorted(items, key=lambda each: (each.rank, each.tensor is not None)):
        mine = groups[item.rank]
        if not mine or size + item.archive.size > max_bytes:
            mine.append([])
            size = 0
        mine[-1].append(item)
        size += item.archive.size
    files: list[PlannedFile] = []
    places: _Places = defaultdict(list)
    for rank, mine in groups.items():
        for number, group in enumerate(mine):
            name = f"__{rank}_{number}.distcp"
            at = 0
            for item in group:
                place = Place(name, at, item.archive.size)
                places[item.key].append((item.box, place))
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
    places: _Places,
) -> Instance:
    return Instance(
        names.METADATA,
        {
            "state_dict_metadata": {
                flat: _described(value, [box for box, _ in places[where[flat]]])
                for flat, value in found.items()
            },
            "planner_data": dict(paths),
            "storage_data": Pairs(
                [
                    (_index(flat, value, number, box), _stored(place))
                    for flat, value in found.items()
                    for number, (box, place) in enumerate(places[where[flat]])
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


def _described(value: object, boxes: Sequence[Box]) -> Instance:
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
    chunks = [
        Instance(
            names.CHUNK, {"offsets": _size(box.offsets), "sizes": _size(box.sizes)}
        )
        for box in boxes
    ]
    return Instance(
        names.TENSOR,
        {
            "properties": properties,
            "size": _size(value.shape),
            "chunks": chunks,
        },
    )


def _index(flat: str, value: object, number: int, box: Box) -> Instance:
    state: dict[str, object] = {"fqn": flat, "index": None}
    if isinstance(value, OutTensor):
        state |= {"index": number, "offset": _size(box.offsets)}
    return Instance(names.INDEX, state)


def _stored(place: Place) -> Instance:
    return Instance(
        names.STORAGE_INFO,
        {"relative_path": place.file, "offset": place.offset, "length": place.length},
    )


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (sizes,))
