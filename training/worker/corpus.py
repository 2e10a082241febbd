"""Read the text a spec names; ``training.data`` cuts and splits it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from fabric.core.errors import ConfigError
from fabric.jobs.spec import DataSpec
from training.data import Corpus, cut, split

MAX_CORPUS_BYTES = 16 << 20
"""Text kept in memory; the rest of a larger source is left out."""

_LEFT_OUT = frozenset({"site-packages", "__pycache__", "test", "tests"})


def load_corpus(spec: DataSpec) -> Corpus:
    """Return the text of ``spec``, split into a training and a held-out part.

    Raises:
        ConfigError: the source is unknown or empty.
    """
    if spec.source != "builtin:python-stdlib":
        raise ConfigError(
            f"data source {spec.source!r} is not one this worker reads",
            code="E_DATA_SOURCE",
            next_step='use "builtin:python-stdlib"',
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    return split(cut(read_sources(root)), spec.validation_fraction)


def read_sources(root: Path) -> bytes:
    """Return the .py files under ``root`` in path order, at most the bound in all."""
    parts: list[bytes] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        # a distribution may link a file to /etc: no part of the library, and a worker
        # cannot read there
        if path.is_symlink() or _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        text = path.read_bytes()
        parts.append(text)
        size += len(text)
        if size >= MAX_CORPUS_BYTES:
            break
    return b"".join(parts)[:MAX_CORPUS_BYTES]
