"""What a checkpoint of any format holds; reads its index only."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import msgspec

from checkpoints.dtypes import item_bytes, tensor_bytes
from checkpoints.formats.registry import open_source
from checkpoints.formats.source import Ignored, Source
from checkpoints.manifest import Json
from checkpoints.reader import CheckpointReader
from fabric.core.errors import IntegrityError


class TensorSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor, or an alias of one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    chunks: int
    alias_of: str = ""


class SectionSummary(msgspec.Struct, kw_only=True):
    """The tensors of one section (``model``, ``outer``) without aliases."""

    tensors: int = 0
    elements: int = 0
    size_bytes: int = 0


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the elements.

    Attributes:
        root: Of a canonical checkpoint; as ``version``, ``step``, ``parent``, ``files``
            and ``layout``.
        ignored: What a conversion would not carry over, and why.
    """

    path: str
    format: str
    sections: dict[str, SectionSummary]
    tensors: list[TensorSummary]
    state: dict[str, Json]
    ignored: list[Ignored]
    root: str = ""
    version: int = 0
    step: int | None = None
    parent: str = ""
    files: dict[str, int] = {}
    layout: dict[str, Json] = {}


def inspect_checkpoint(
    path: Path, *, root: str = "", from_format: str = ""
) -> Inspection:
    """Return what the checkpoint at ``path`` holds; reads its index only.

    Raises:
        ConfigError: there is none.
        IntegrityError: it is damaged, not whole, or has another root.
    """
    with open_source(path, from_format) as source:
        tensors = [_summary(source, name) for name in source.names()]
        sections: defaultdict[str, SectionSummary] = defaultdict(SectionSummary)
        for tensor in tensors:
            if not tensor.alias_of:
                section = sections[tensor.name.partition("/")[0]]
                section.tensors += 1
                section.size_bytes += tensor.size_bytes
                section.elements += tensor.size_bytes // item_bytes(tensor.dtype)
        found = Inspection(
            path=str(source.path),
            format=source.format,
            sections=dict(sections),
            tensors=tensors,
            state=dict(source.state),
            ignored=list(source.ignored),
        )
        return _with_manifest(found, source, root)


def _with_manifest(found: Inspection, source: Source, root: str) -> Inspection:
    """Add what only a canonical checkpoint has."""
    own = source.root if isinstance(source, CheckpointReader) else ""
    if root and root != own:
        raise IntegrityError(
            f"{source.path}: root {own or 'none'}, wanted {root}",
            code="E_ROOT",
            next_step="the checkpoint was changed, or is another one",
        )
    if not isinstance(source, CheckpointReader):
        return found
    manifest = source.manifest
    return msgspec.structs.replace(
        found,
        root=own,
        version=manifest.version,
        step=manifest.step,
        parent=manifest.parent,
        files={name: file.size for name, file in manifest.files.items()},
        layout=manifest.layout,
    )


def _summary(source: Source, name: str) -> TensorSummary:
    entry = source.entry(name)
    return TensorSummary(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        size_bytes=tensor_bytes(entry.dtype, entry.shape),
        chunks=len(source.boxes(name)),
        alias_of=source.aliases.get(name, ""),
    )
