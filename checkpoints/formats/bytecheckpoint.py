"""Checkpoints of ByteCheckpoint (``global_step_<n>``), of its FSDP, FSDP2 and DDP.

``model`` and ``optimizer`` are directories with an index like that of torch's
distributed checkpoints, and files that hold the bare bytes of each box; the index has,
for each, the pickle that says how the bytes are strided. ``extra_state`` has a file of
each rank. Boxes have no checksum; index and files must agree to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from checkpoints.boxes import Box, strides_of
from checkpoints.dtypes import tensor_bytes
from checkpoints.formats.dcp import state_paths
from checkpoints.formats.dcp_files import (
    Contents,
    DataFile,
    add_object,
    mismatch,
    places_by_file,
)
from checkpoints.formats.dcp_index import (
    METADATA_NAME,
    Chunk,
    DcpIndex,
    Dialect,
    IndexedTensor,
    broken,
    index_key,
    read_index,
)
from checkpoints.formats.extent_source import Extent, StoredTensor
from checkpoints.formats.pickle_values import Global, TensorRef
from checkpoints.formats.source import Ignored, Source
from checkpoints.formats.state_leaves import Path as StatePath
from checkpoints.formats.state_leaves import leaves
from checkpoints.formats.stored_state import FlatTensor, build_source, found_leaves
from checkpoints.formats.torch_zip import Archive, read_archive
from checkpoints.formats.unpickle import unpickle_untrusted
from fabric.core.errors import ConfigError

LATEST_NAME = "latest_checkpointed_iteration.txt"
STEP_PREFIX = "global_step_"
PARTS = ("model", "optimizer")
EXTRA_STATE = "extra_state"

_MODULE = "bytecheckpoint.checkpointer.meta_type"
DIALECT = Dialect(
    metadata=(Global(_MODULE, "Metadata"),),
    storage=Global(_MODULE, "_StorageInfo"),
    modules=(_MODULE,),
)

_Headers = Mapping[tuple[str, tuple[int, ...] | None], object]


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a step, or a directory of steps with a latest one."""
    if any((path / part / METADATA_NAME).is_file() for part in PARTS):
        return True
    return (path / LATEST_NAME).is_file() and any(path.glob(f"{STEP_PREFIX}*"))


def open_source(path: Path) -> Source:
    """Open a step of ByteCheckpoint.

    Raises:
        ConfigError: there is none.
        IntegrityError: it is damaged, not whole, or hostile.
    """
    step = latest_step(path, STEP_PREFIX)
    parts: list[Contents] = []
    found: list[tuple[StatePath, object]] = []
    ignored: list[Ignored] = []
    for entry in sorted(step.iterdir()):
        if entry.name in PARTS:
            index = read_index(entry, DIALECT)
            contents = _contents(step, entry.name, index)
            parts.append(contents)
            paths = {
                f"{entry.name}.{flat}": (entry.name, *place)
                for flat, place in state_paths(index).items()
            }
            found += found_leaves(paths, contents)
        elif entry.name == EXTRA_STATE:
            for file in sorted(entry.iterdir()):
                archive = read_archive(step, f"{EXTRA_STATE}/{file.name}")
                found += _extra(file.stem, archive)
                parts.append(Contents({}, {}, {}, {}, list(archive.checksums)))
        else:
            ignored.append(Ignored(entry.name, "not a part that is read here"))
    return build_source("bytecheckpoint", path, step, found, parts, ignored)


def latest_step(path: Path, prefix: str) -> Path:
    """Return ``path`` if it is a step, else the one that its file of the latest names.

    Raises:
        ConfigError: that is not there.
    """
    latest = path / LATEST_NAME
    if not latest.is_file():
        return path
    text = latest.read_text(errors="replace")[:40].strip()
    for step in sorted(path.glob(f"{prefix}*")):
        number = step.name.removeprefix(prefix)
        if number.isdecimal() and text.isdecimal() and int(number) == int(text):
            return step
    raise ConfigError(
        f"{latest} names step {text!r}, which is not there",
        code="E_NOT_FOUND",
        next_step="give the directory of a step",
    )


def _extra(stem: str, archive: Archive) -> list[tuple[StatePath, object]]:
    """Return the leaves of a rank's file; tensors of random generators are ``rng``."""
    rank = stem.rpartition("_")[2]
    found: list[tuple[StatePath, object]] = []
    for path, value in leaves(archive.value):
        if isinstance(value, TensorRef):
            kind = "rng" if path and "rng" in str(path[0]) else EXTRA_STATE
            leaf = FlatTensor("", archive.stored(value))
            found.append(((kind, f"rank_{rank}", *path), leaf))
        else:
            found.append((("ranks", rank, *path), value))
    return found


def _contents(step: Path, part: str, index: DcpIndex) -> Contents:
    """Find everything of a part; its flat names and files begin with the part's."""
    contents = Contents({}, {}, {}, {}, [])
    for file, places in places_by_file(index).items():
        with DataFile(step, f"{part}/{file}", ()) as opened:
            for place in places:
                opened.check_inside(place)
            opened.check_cover(places)
            for name, place in index.objects.items():
                if place.file == file:
                    item = opened.item(place)
                    add_object(f"{part}.{name}", item, contents)
                    if isinstance(item, Archive):
                        contents.checksums += item.checksums
    headers = _headers(index)
    for name, tensor in index.tensors.items():
        extents = tuple(
            _extent(part, name, tensor, chunk, headers)
            for chunk in tensor.chunks
            if chunk.box.volume
        )
        stored = StoredTensor(tensor.dtype, tensor.shape, extents)
        contents.tensors[f"{part}.{name}"] = stored
    return contents


def _headers(index: DcpIndex) -> _Headers:
    found = index.root.get("all_tensor_metadata")
    if not isinstance(found, dict):
        raise broken("no list of how bytes are strided")
    return {index_key(key): header for key, header in found.items()}


def _extent(
    part: str, name: str, tensor: IndexedTensor, chunk: Chunk, headers: _Headers
) -> Extent:
    """Return where a box lies, as the pickle of its tensor says."""
    header = headers.get((name, chunk.box.offsets))
    ref = unpickle_untrusted(header) if isinstance(header, bytes) else None
    file = f"{part}/{chunk.place.file}"
    if not isinstance(ref, TensorRef):
        raise mismatch(name, file, "nothing says how its bytes are strided")
    wanted = (tensor.dtype, chunk.box.sizes, chunk.place.length)
    if (ref.dtype, ref.shape, ref.storage.size) != wanted:
        raise mismatch(
            name,
            file,
            f"{ref.dtype} {list(ref.shape)} in {ref.storage.size} B, and "
            f"{tensor.dtype} {list(chunk.box.sizes)} in {chunk.place.length} B in the "
            "index",
        )
    dense = ref.strides == strides_of(ref.shape)
    begin = chunk.place.offset + ref.offset * tensor_bytes(tensor.dtype, ())
    box = Box(chunk.box.offsets, chunk.box.sizes)
    return Extent(box, file, begin, None if dense else ref.strides)
