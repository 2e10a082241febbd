"""One rank's files of a step: those that are as they were are linked, not written.

A file whose bytes are known to be those of the step before becomes a second name of it
(a hard link), with the record that it had. Known means: no staged byte changed since
that step was committed, or, for files that are expected to stay as they are (frozen
weights), that the bytes have the hash that the step's manifest says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoints.directories import disk_errors, locate
from checkpoints.image_file import hash_image, write_image
from checkpoints.manifest import FileEntry
from checkpoints.parts import Hook
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.staging import StagedFile
from fabric.core.errors import FabricError


class Parent(NamedTuple):
    """The step before: where it is, its root, and its files that may be shared.

    Attributes:
        path: Its directory.
        root: Its root.
        files: Their records.
        staged: These are the files that were staged last.
    """

    path: Path
    root: str
    files: Mapping[str, FileEntry]
    staged: bool


def parent_on_disk(directory: Path) -> Parent | None:
    """Return the latest step, as a process that starts again finds it."""
    try:
        with CheckpointReader(locate(directory).path) as reader:
            return Parent(reader.path, reader.root, reader.manifest.files, staged=False)
    except FabricError:
        return None  # none yet, or damaged: nothing to share with


def write_files(
    temporary: Path,
    staged: Sequence[StagedFile],
    parent: Parent | None,
    on_point: Hook,
) -> dict[str, FileEntry]:
    """Write or link this rank's files into the step's temporary directory.

    Raises:
        ResourceExhausted: the disk is full.
        ConfigError: another error of the file system.
    """
    files = {}
    with disk_errors(temporary):
        for file in staged:
            name = file.layout.name
            on_point("file.create")
            entry = _shared(temporary / name, file, parent)
            if entry is None:
                entry = write_image(temporary / name, file.image, file.padded)
            on_point("file.synced")
            files[name] = entry
    return files


def _shared(path: Path, file: StagedFile, parent: Parent | None) -> FileEntry | None:
    """Link the parent's file if it has these bytes; return its record, or None."""
    entry = parent.files.get(path.name) if parent else None
    if parent is None or entry is None or entry.size != len(file.image):
        return None
    known = file.unchanged and parent.staged
    if not known and ("-frozen-" not in path.name or hash_image(file.image) != entry):
        return None
    source = parent.path / path.name
    try:
        if source.stat().st_size != entry.size:
            return None
        os.link(source, path)
    except OSError:  # no links here, too many, or the step was deleted meanwhile
        return None
    return entry
