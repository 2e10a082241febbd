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

from checkpoints.formats.dcp_files import Contents, read_contents
from checkpoints.formats.dcp_index import METADATA_NAME, DcpIndex, read_index
from checkpoints.formats.dcp_sink import DcpSink
from checkpoints.formats.extent_source import ExtentSource, StoredTensor
from checkpoints.formats.source import Ignored, Source
from checkpoints.formats.state_leaves import Path as StatePath
from checkpoints.formats.state_names import MODEL_KEYS, OPTIMIZER_KEYS, name_state
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
    return source_of("dcp", path, path, index, read_contents(path, index))


def source_of(
    name: str, path: Path, base: Path, index: DcpIndex, contents: Contents
) -> ExtentSource:
    """Return a source under canonical names.

    Args:
        name: Of the format.
        path: What the user named.
        base: Directory of the files.
        index: What there is.
        contents: Where it lies.
    """
    paths = state_paths(index)
    found: list[tuple[StatePath, object]] = [
        (paths[flat], _Named(flat, tensor)) for flat, tensor in contents.tensors.items()
    ]
    for flat, leaves in contents.objects.items():
        for inner, value in leaves:
            where = (*paths[flat], *inner)
            inside = _Named("", value) if isinstance(value, StoredTensor) else value
            found.append((where, inside))
    named = name_state(found, _Named)
    names = {each.flat: name for name, each in named.tensors.items() if each.flat}
    aliases = {names[flat]: names[of] for flat, of in contents.aliases.items()}
    return ExtentSource(
        name,
        path,
        base,
        {
            name: each.tensor
            for name, each in named.tensors.items()
            if name not in aliases
        },
        aliases=aliases,
        state=named.state,
        ignored=[
            *named.ignored,
            *(Ignored(flat, reason) for flat, reason in contents.unread.items()),
        ],
        checksums=contents.checksums,
    )


class _Named:
    """A tensor that remembers its flat name."""

    def __init__(self, flat: str, tensor: StoredTensor) -> None:
        self.flat = flat
        self.tensor = tensor


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
