"""Sharded safetensors of torch's distributed checkpoints.

``HuggingFaceStorageWriter(save_distributed=True)`` writes a file of each rank,
``shard-<rank>-model-<k>-of-<n>.safetensors``, whose metadata says where each part
begins. Nothing says how large the whole tensors are, nor how many ranks there were: if
the last rank's file is lost, every tensor is shorter and nothing looks wrong (torch's
own consolidation writes them so). So who reads them must say which file is the last, by
naming it: the source is that file, and those of all ranks before it.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from checkpoints.boxes import Box
from checkpoints.formats.dcp_files import SHARDING_KEY, shard_offsets
from checkpoints.formats.extent_source import (
    Extent,
    ExtentSource,
    StoredTensor,
    open_regular,
)
from checkpoints.formats.source import MODEL, Ignored, Source
from checkpoints.safetensors_io import Header, read_header_untrusted
from fabric.core.errors import ConfigError, IntegrityError

_FILE = re.compile(r"shard-(?P<rank>\d{5})-model-(?P<part>\d{5})-of-(?P<parts>\d{5})")
_SUFFIX = ".safetensors"


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a rank's file, or a directory of them."""
    if path.is_dir():
        return any(
            _FILE.fullmatch(each.stem) for each in path.glob(f"shard-*{_SUFFIX}")
        )
    return path.suffix == _SUFFIX and _FILE.fullmatch(path.stem) is not None


def open_source(path: Path) -> Source:
    """Open the files of all ranks up to the one that ``path`` names.

    Raises:
        ConfigError: a directory is named, not the last file.
        IntegrityError: parts are missing, twice, or not what they say.
    """
    named = _FILE.fullmatch(path.stem)
    if path.is_dir() or named is None:
        raise ConfigError(
            f"{path}: files of ranks do not say how many there were: with the last "
            "ones lost, tensors would be cut short",
            code="E_RANKS",
            next_step="name the last rank's file instead of the directory",
        )
    base, last = path.parent, int(named["rank"])
    os.close(open_regular(base, path.name))
    extents: dict[str, list[Extent]] = defaultdict(list)
    dtypes: dict[str, str] = {}
    ignored: list[Ignored] = []
    for file in sorted(base.glob(f"shard-*{_SUFFIX}")):
        matched = _FILE.fullmatch(file.stem)
        if matched is None or not 0 < int(matched["rank"]) <= last:
            ignored.append(Ignored(file.name, "of a rank after the last one"))
            continue
        header = _header(base, file.name)
        for name, extent in _extents(file.name, header):
            entry = header.tensors[name]
            if dtypes.setdefault(name, entry.dtype) != entry.dtype:
                raise _mixed(file.name, name, "of two element types")
            if extents[name] and len(extents[name][0].box.sizes) != len(entry.shape):
                raise _mixed(file.name, name, "of two numbers of dimensions")
            extents[name].append(extent)
    tensors = {
        MODEL + name: StoredTensor(dtypes[name], _shape(found), _full(found))
        for name, found in extents.items()
    }
    return ExtentSource("dcp-safetensors", path, base, tensors, ignored=ignored)


def _header(base: Path, file: str) -> Header:
    with open(open_regular(base, file), "rb") as opened:
        header = read_header_untrusted(opened)
    if SHARDING_KEY not in header.metadata:
        raise _mixed(file, "", "without saying where its parts belong")
    return header


def _extents(file: str, header: Header) -> list[tuple[str, Extent]]:
    found = []
    for name, offsets in shard_offsets(file, header):
        entry = header.tensors[name]
        begin = header.data_begin + entry.data_offsets[0]
        found.append((name, Extent(Box(offsets, entry.shape), file, begin)))
    return found


def _shape(extents: list[Extent]) -> tuple[int, ...]:
    """Return how far the parts reach: what the whole tensor is, if none is missing."""
    ends = [
        [offset + size for offset, size in zip(*extent.box, strict=True)]
        for extent in extents
    ]
    return tuple(max(column) for column in zip(*ends, strict=True))


def _full(extents: list[Extent]) -> tuple[Extent, ...]:
    return tuple(extent for extent in extents if extent.box.volume)


def _mixed(file: str, name: str, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{file}: {name[:80]!r} {reason}",
        code="E_MIXED",
        next_step="files of two saves are mixed: use another copy",
    )
