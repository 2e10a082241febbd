"""Which bytes of a checkpoint some of its tensors need. Pure.

Ranges are widened to the 1 MiB blocks of each file that the manifest hashes: a reader
of the fetched part then verifies every byte it reads against the manifest itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from checkpoints.manifest import MANIFEST_NAME, Manifest
from dht.manifest import BlobManifest
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, IntegrityError

Range = tuple[int, int]


def select_names(manifest: Manifest, patterns: Sequence[str]) -> list[str]:
    """Return the tensors and aliases that match any of ``patterns``, sorted.

    Args:
        manifest: The checkpoint's.
        patterns: Shell patterns ("model/*"); ``*`` also matches "/".

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = sorted([*manifest.tensors, *manifest.aliases])
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            some = ", ".join(names[:3])
            raise ConfigError(
                f"no tensor matches {pattern!r}",
                code="E_NO_TENSOR",
                next_step=f"there are {len(names)}, such as {some}",
            )
        found |= matched
    return sorted(found)


def needed_ranges(
    manifest: Manifest, names: Iterable[str], blob: BlobManifest
) -> list[Range]:
    """Return the ranges of ``blob`` that hold the tensors ``names`` and the manifest.

    Raises:
        IntegrityError: the blob lacks a file of the checkpoint, or has another size of
            it: it is not this checkpoint.
    """
    places = {entry.path: entry for entry in blob.entries}
    ranges = []
    for file, wanted in _file_ranges(manifest, set(names)).items():
        entry, size = places.get(file), manifest.files[file].size
        if entry is None or entry.size != size:
            raise IntegrityError(
                f"the content has no {file} of {size} B: it is no whole checkpoint",
                code="E_MISSING_FILE",
            )
        ranges += [
            (entry.offset + begin, entry.offset + min(end, size))
            for begin, end in wanted
        ]
    own = places[MANIFEST_NAME]
    return [*ranges, (own.offset, own.offset + own.size)]


def _file_ranges(manifest: Manifest, names: Collection[str]) -> dict[str, list[Range]]:
    ranges: dict[str, list[Range]] = {}
    for name in {manifest.aliases.get(name, name) for name in names}:
        for chunk in manifest.tensors[name].chunks:
            first = chunk.begin // BLOCK_BYTES * BLOCK_BYTES
            end = -(-chunk.end // BLOCK_BYTES) * BLOCK_BYTES
            ranges.setdefault(chunk.file, []).append((first, end))
    return ranges
