"""Torch distributed checkpoints (``torch.distributed.checkpoint``).

A directory of ``.metadata``, a pickle that says which box of which tensor lies where,
and files ``__<rank>_<n>.distcp``: archives of ``torch.save`` one after another, one for
each box and each object. torch executes the pickle and those of objects, takes bytes
that an interrupted save replaced for those of the index, and looks at no checksum;
here nothing is executed, and the index, the files and the archives must agree.

torch can also write such files as safetensors (:mod:`checkpoints.formats.dcp_files`).
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.formats.dcp_files import read_contents
from checkpoints.formats.dcp_index import METADATA_NAME, DcpIndex, read_index
from checkpoints.formats.dcp_sink import DcpSink
from checkpoints.formats.source import Source
from checkpoints.formats.state_leaves import Path as StatePath
from checkpoints.formats.state_names import MODEL_KEYS, OPTIMIZER_KEYS
from checkpoints.formats.stored_state import build_source, found_leaves
from fabric.core.errors import ConfigError

_RANKS = "__*.metadata"


def sniff(path: Path) -> bool:
    """Return whether ``path`` is the directory of a distributed checkpoint."""
    return (path / METADATA_NAME).is_file() or any(path.glob(_RANKS))


def open_source(path: Path) -> Source:
    """Open the directory of a distributed checkpoint.

    Raises:
        ConfigError: its ranks wrote an index each.
        IntegrityError: it is damaged, not whole, or hostile.
    """
    if not (path / METADATA_NAME).is_file():
        raise ConfigError(
            f"{path}: every rank wrote an index of its own",
            code="E_FORMAT",
            next_step="load it with torch in as many processes, and save it with "
            "use_collectives=True",
        )
    index = read_index(path)
    contents = read_contents(path, index)
    found = found_leaves(state_paths(index), contents)
    return build_source("dcp", path, path, found, [contents])


def state_paths(index: DcpIndex) -> dict[str, StatePath]:
    """Return the path of everything in the state that was saved.

    Where the writer did not note them, names that begin as an optimizer's say that the
    state had parts.
    """
    names = [*index.tensors, *index.objects]
    heads = {name.partition(".")[0] for name in names}
    parts = heads & {*OPTIMIZER_KEYS}
    if parts:
        parts |= heads & {*MODEL_KEYS}
    paths: dict[str, StatePath] = {}
    for name in names:
        head, _, rest = name.partition(".")
        guessed = (head, rest) if head in parts and rest else (name,)
        paths[name] = index.paths.get(name, guessed)
    return paths


SINK = DcpSink()
