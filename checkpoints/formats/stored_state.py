"""A source made of the leaves that data files of several parts were found to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

from checkpoints.formats.dcp_files import Contents
from checkpoints.formats.extent_source import ExtentSource, StoredTensor
from checkpoints.formats.source import Ignored
from checkpoints.formats.state_leaves import Path
from checkpoints.formats.state_names import name_state


class FlatTensor:
    """A tensor that remembers its flat name; empty if it was inside an object."""

    def __init__(self, flat: str, tensor: StoredTensor) -> None:
        self.flat = flat
        self.tensor = tensor


def found_leaves(
    paths: Mapping[str, Path], contents: Contents
) -> list[tuple[Path, object]]:
    """Return path and value of everything in ``contents``.

    Args:
        paths: Flat name -> path.
        contents: Tensors and objects.
    """
    found: list[tuple[Path, object]] = [
        (paths[flat], FlatTensor(flat, tensor))
        for flat, tensor in contents.tensors.items()
    ]
    for flat, inside in contents.objects.items():
        for path, value in inside:
            leaf = FlatTensor("", value) if isinstance(value, StoredTensor) else value
            found.append(((*paths[flat], *path), leaf))
    return found


def build_source(
    name: str,
    path: FilePath,
    base: FilePath,
    found: Sequence[tuple[Path, object]],
    parts: Sequence[Contents],
    ignored: Sequence[Ignored] = (),
) -> ExtentSource:
    """Return a source under canonical names.

    Args:
        name: Of the format.
        path: What the user named.
        base: Directory of the files.
        found: Path and value of each leaf.
        parts: Where the leaves come from; flat names are unique among them.
        ignored: What else is not carried over.
    """
    named = name_state(found, FlatTensor)
    names = {each.flat: name for name, each in named.tensors.items() if each.flat}
    aliases = {
        names[flat]: names[of] for part in parts for flat, of in part.aliases.items()
    }
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
            *(Ignored(*each) for part in parts for each in part.unread.items()),
            *ignored,
        ],
        checksums=[each for part in parts for each in part.checksums],
    )
