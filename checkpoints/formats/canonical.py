"""The canonical format among the others."""

from __future__ import annotations

from pathlib import Path

from checkpoints.directories import LATEST_NAME
from checkpoints.formats.source import Source
from checkpoints.manifest import MANIFEST_NAME
from checkpoints.reader import CheckpointReader


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a step, or has a ``latest`` that names one."""
    if (path / MANIFEST_NAME).is_file():
        return True
    latest = path / LATEST_NAME
    return latest.is_file() and latest.read_bytes()[:5] == b"step-"


def open_source(path: Path) -> Source:
    """Open a step; see :class:`checkpoints.reader.CheckpointReader`."""
    return CheckpointReader(path)
