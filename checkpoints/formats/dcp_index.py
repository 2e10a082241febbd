"""The index of a torch distributed checkpoint: its ``.metadata``, as typed records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath

import msgspec

from checkpoints.boxes import Box
from checkpoints.formats.pickle_values import Global, Record, dtype_of, integers
from checkpoints.formats.state_leaves import Path
from checkpoints.formats.unpickle import LIMITS, unpickle_untrusted
from fabric.core.errors import IntegrityError

METADATA_NAME = ".metadata"
VERSIONS = (None, "1.0.0")
"""torch before 2.7 wrote none."""

_MODULE = "torch.distributed.checkpoint.metadata"
METADATA = Global(_MODULE, "Metadata")
TENSOR = Global(_MODULE, "TensorStorageMetadata")
OBJECT = Global(_MODULE, "BytesStorageMetadata")
CHUNK = Global(_MODULE, "ChunkStorageMetadata")
INDEX = Global(_MODULE, "MetadataIndex")
PROPERTIES = Global(_MODULE, "TensorProperties")
STORAGE_META = Global(_MODULE, "StorageMeta")
MEMORY_FORMAT = Global(_MODULE, "_MEM_FORMAT_ENCODING")
STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """What the index of torch is called where other programs write it.

    Attributes:
        metadata: Classes of the index.
        storage: Class of a place.
        modules: Modules whose names it may use besides torch's.
    """

    metadata: tuple[Global, ...] = (METADATA,)
    storage: Global = STORAGE_INFO
    modules: tuple[str, ...] = ()


TORCH = Dialect()


class Place(msgspec.Struct, frozen=True):
    """Bytes of a file that hold a chunk or an object."""

    file: str
    offset: int
    length: int


class Chunk(msgspec.Struct, frozen=True):
    """A box of a tensor, and where it is."""

    box: Box
    place: Place


class IndexedTensor(msgspec.Struct, frozen=True):
    """A tensor's type, shape and chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class DcpIndex(msgspec.Struct, frozen=True):
    """What a checkpoint holds.

    Attributes:
        tensors: By flat name.
        objects: Everything else, by flat name.
        paths: Flat name -> path in the state that was saved; not for all writers.
        written: When the index was written, in seconds as files have it.
        root: All fields of the index.
    """

    tensors: Mapping[str, IndexedTensor]
    objects: Mapping[str, Place]
    paths: Mapping[str, Path]
    written: float
    root: Mapping[object, object]

    def places(self) -> Iterator[Place]:
        """Yield where everything is."""
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                yield chunk.place
        yield from self.objects.values()


def broken(reason: str, code: str = "E_INDEX") -> IntegrityError:
    """Return the error of an index that does not say what it must."""
    return IntegrityError(
        f"{METADATA_NAME}: {reason}",
        code=code,
        next_step="the checkpoint is damaged, hostile, or of a version unknown here: "
        "use another copy",
    )


def read_index(directory: FilePath, dialect: Dialect = TORCH) -> DcpIndex:
    """Return the index in ``directory``.

    Raises:
        IntegrityError: it is damaged or hostile.
    """
    with (directory / METADATA_NAME).open("rb") as file:
        data = file.read(LIMITS.max_bytes + 1)
        written = os.fstat(file.fileno()).st_mtime
    value = unpickle_untrusted(data, modules=dialect.modules)
    return _parse_index(value, written, dialect)


def _parse_index(value: object, written: float, dialect: Dialect) -> DcpIndex:
    """Return the index that a pickle, written then, was read into.

    Every chunk must have a place and every place a chunk: a checkpoint whose index
    lost either would load with old or no values there.

    Raises:
        IntegrityError: it is none (``E_INDEX``), of a later version (``E_VERSION``), or
            misses chunks (``E_GAP``).
    """
    root = _state(value, *dialect.metadata)
    if root.get("version") not in VERSIONS:
        raise broken(f"version {str(root.get('version'))[:40]!r}", "E_VERSION")
    places = _places(root.get("storage_data"), dialect)
    tensors: dict[str, IndexedTensor] = {}
    objects: dict[str, Place] = {}
    for name, entry in _items(root.get("state_dict_metadata")):
        if isinstance(entry, Record) and entry.kind == OBJECT:
            objects[name] = _take(places, name, None)
        else:
            tensors[name] = _tensor(name, _state(entry, TENSOR), places)
    if places:
        name, _ = min(places, key=str)
        raise broken(f"{len(places)} places of nothing, such as of {name[:80]!r}")
    paths = _paths(root.get("planner_data"))
    return DcpIndex(tensors, objects, paths, written, root)


_Places = dict[tuple[str, tuple[int, ...] | None], Place]


def _places(value: object, dialect: Dialect) -> _Places:
    if not isinstance(value, dict):
        raise broken("no places")
    places: _Places = {}
    for key, info in value.items():
        name, at = index_key(key)
        if (name, at) in places:
            raise broken(f"{name[:80]!r} at {at} is stored twice", "E_OVERLAP")
        places[name, at] = _place(_state(info, dialect.storage))
    return places


def index_key(value: object) -> tuple[str, tuple[int, ...] | None]:
    """Return name and offset that a ``MetadataIndex`` is."""
    index = _state(value, INDEX)
    name, offset = index.get("fqn"), index.get("offset")
    if not isinstance(name, str):
        raise broken("a place of no name")
    return name, None if offset is None else integers(offset)


def _place(info: Mapping[object, object]) -> Place:
    file, offset, length = (
        info.get(key) for key in ("relative_path", "offset", "length")
    )
    if info.get("transform_descriptors"):
        raise broken("chunks packed by an extension, which is not read", "E_FORMAT")
    if not isinstance(file, str):
        raise broken("a place without a file")
    return Place(file, *integers((offset, length)))


def _take(places: _Places, name: str, offset: tuple[int, ...] | None) -> Place:
    place = places.pop((name, offset), None)
    if place is None:
        raise IntegrityError(
            f"{METADATA_NAME}: {name[:80]!r} at {offset} is stored nowhere",
            code="E_GAP",
            next_step="the save did not finish: use another step",
        )
    return place


def _tensor(
    name: str, entry: Mapping[object, object], places: _Places
) -> IndexedTensor:
    properties, chunks = entry.get("properties"), entry.get("chunks")
    if not isinstance(properties, Record) or not isinstance(chunks, list):
        raise broken(f"{name[:80]!r} has no properties or chunks")
    state = properties.state
    if isinstance(state, dict):  # torch 2.0
        state = (state.get("dtype"),)
    if not isinstance(state, tuple) or not state:
        raise broken(f"{name[:80]!r} has no element type")
    return IndexedTensor(
        dtype_of(state[0]),
        integers(entry.get("size")),
        tuple(_chunk(name, _state(chunk, CHUNK), places) for chunk in chunks),
    )


def _chunk(name: str, chunk: Mapping[object, object], places: _Places) -> Chunk:
    offsets = integers(chunk.get("offsets"))
    box = Box(offsets, integers(chunk.get("sizes")))
    if len(box.offsets) != len(box.sizes):
        raise broken(f"{name[:80]!r}: offsets and sizes of different dimensions")
    return Chunk(box, _take(places, name, offsets))


def _paths(value: object) -> dict[str, Path]:
    """Return the paths that torch's planner wrote down; other planners write others."""
    if not isinstance(value, dict):
        return {}
    return {
        name: path
        for name, path in value.items()
        if isinstance(name, str)
        and isinstance(path, tuple)
        and all(isinstance(step, str | int) for step in path)
        and ".".join(map(str, path)) == name
    }


def _items(value: object) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise broken("no list of what is in it")
    for name, entry in value.items():
        if not isinstance(name, str):
            raise broken("a name that is no text")
        yield name, entry


def _state(value: object, *kinds: Global) -> Mapping[object, object]:
    """Return the attributes of a record of a kind; one without any has none."""
    if not isinstance(value, Record) or value.kind not in kinds or value.args:
        raise broken(f"no {kinds[0].name} where one belongs")
    if value.state is None:
        return {}
    if not isinstance(value.state, dict):
        raise broken(f"a {kinds[0].name} of something else")
    return value.state
