"""Write some tensors of a checkpoint as a checkpoint of their own. Blocking.

The result is canonical and valid: its own manifest, its own root, and the checkpoint it
is a part of as its parent. The state is copied whole; an alias whose stored tensor was
not chosen becomes a stored tensor.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from checkpoints.boxes import whole
from checkpoints.directories import disk_errors, step_path, sync_directory
from checkpoints.hashed_file import Buffer
from checkpoints.parts import ChunkSource
from checkpoints.reader import CheckpointReader
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError


def write_subset(
    source: Path, names: Sequence[str], target: Path, only: Sequence[str]
) -> str:
    """Write the tensors ``names`` of the step ``source`` as the step ``target``.

    Args:
        source: A step's directory; only the wanted tensors need be in its files.
        names: Tensors and aliases.
        target: New directory; complete or not there.
        only: The patterns that chose the names, for people.

    Returns:
        The root of the new checkpoint.

    Raises:
        ConfigError: ``target`` exists.
        IntegrityError: a byte that was read is not what the manifest says.
        ResourceExhausted: the disk is full; ``target`` is not made.
    """
    if target.exists():
        raise ConfigError(f"{target} exists", next_step="choose another target")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fabric-fetch-", dir=target.parent))
    try:
        with CheckpointReader(source) as reader:
            root = _write(reader, names, work, only)
            step = step_path(work, reader.manifest.step)
        with disk_errors(target):
            step.rename(target)
            sync_directory(target.parent)
        return root
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(
    reader: CheckpointReader, names: Sequence[str], work: Path, only: Sequence[str]
) -> str:
    aliases = reader.manifest.aliases
    chosen = set(names)
    kept = {n: aliases[n] for n in chosen if n in aliases and aliases[n] in chosen}
    sources = [_source(reader, name) for name in sorted(chosen - kept.keys())]
    layout = {
        **reader.manifest.layout,
        "subset": {"of": reader.root, "only": list(only)},
    }
    with CheckpointWriter(work, reader.manifest.step) as writer:
        part = writer.write("subset", sources)
        return writer.commit(
            [part],
            state=reader.manifest.state,
            aliases=kept,
            layout=layout,
            parent=reader.root,
        )


def _source(reader: CheckpointReader, name: str) -> ChunkSource:
    entry = reader.entry(name)

    def read() -> Iterable[Buffer]:
        return reader.windows(name)

    reads: Callable[[], Iterable[Buffer]] = read
    return ChunkSource(name, entry.dtype, entry.shape, whole(entry.shape), reads)
