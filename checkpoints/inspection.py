"""What a checkpoint holds, and how two of them differ, from their manifests' words."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import msgspec

from checkpoints.dtypes import tensor_bytes
from checkpoints.manifest import Json
from checkpoints.progress import Progress, no_progress
from checkpoints.reader import CheckpointReader
from checkpoints.safetensors_file import hash_windows


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
    """Everything but the elements."""

    path: str
    root: str
    version: int
    step: int
    parent: str
    sections: dict[str, SectionSummary]
    files: dict[str, int]
    tensors: list[TensorSummary]
    state: dict[str, Json]
    layout: dict[str, Json]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A name under which two checkpoints differ.

    Attributes:
        name: Tensor, or ``state.<key>``.
        kind: "only_in_first", "only_in_second", "type", "shape", "elements", "state".
        detail: The two values, in words.
    """

    name: str
    kind: str
    detail: str = ""


class DiffReport(msgspec.Struct, frozen=True, kw_only=True):
    """All differences between two checkpoints; none if ``same``."""

    first: str
    second: str
    same: bool
    compared_tensors: int
    differences: list[Difference]


def inspect_checkpoint(path: Path, *, root: str = "") -> Inspection:
    """Return what the checkpoint at ``path`` holds; reads the manifest only.

    Raises:
        ConfigError: there is none.
        IntegrityError: the manifest is damaged, or has another root.
    """
    with CheckpointReader(path, root=root) as reader:
        manifest = reader.manifest
        tensors = [_summary(reader, name) for name in reader.names()]
        sections: defaultdict[str, SectionSummary] = defaultdict(SectionSummary)
        for tensor in tensors:
            if not tensor.alias_of:
                section = sections[tensor.name.partition("/")[0]]
                section.tensors += 1
                section.size_bytes += tensor.size_bytes
                section.elements += tensor.size_bytes // tensor_bytes(tensor.dtype, ())
        return Inspection(
            path=str(reader.path),
            root=reader.root,
            version=manifest.version,
            step=manifest.step,
            parent=manifest.parent,
            sections=dict(sections),
            files={name: file.size for name, file in manifest.files.items()},
            tensors=tensors,
            state=manifest.state,
            layout=manifest.layout,
        )


def _summary(reader: CheckpointReader, name: str) -> TensorSummary:
    entry = reader.entry(name)
    return TensorSummary(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        size_bytes=tensor_bytes(entry.dtype, entry.shape),
        chunks=len(entry.chunks),
        alias_of=reader.manifest.aliases.get(name, ""),
    )


def diff_checkpoints(
    first: Path, second: Path, *, on_progress: Progress = no_progress
) -> DiffReport:
    """Return how two checkpoints differ: element bytes, types, shapes, names, state.

    How the elements are cut into chunks and files does not matter. Reads both in
    bounded memory; every byte is verified on the way.

    Raises:
        ConfigError: one is missing.
        IntegrityError: one is damaged.
    """
    with CheckpointReader(first) as a, CheckpointReader(second) as b:
        differences = [
            Difference(name=name, kind=kind)
            for kind, mine, other in (
                ("only_in_first", a, b),
                ("only_in_second", b, a),
            )
            for name in sorted(set(mine.names()) - set(other.names()))
        ]
        common = sorted(set(a.names()) & set(b.names()))
        total = sum(_summary(a, name).size_bytes for name in common)
        done = 0
        for name in common:
            difference = _diff_tensor(a, b, name)
            if difference is not None:
                differences.append(difference)
            done += _summary(a, name).size_bytes
            on_progress(done, total)
        differences += _diff_state(a.manifest.state, b.manifest.state)
        return DiffReport(
            first=str(a.path),
            second=str(b.path),
            same=not differences,
            compared_tensors=len(common),
            differences=differences,
        )


def _diff_tensor(
    a: CheckpointReader, b: CheckpointReader, name: str
) -> Difference | None:
    mine, other = a.entry(name), b.entry(name)
    if mine.dtype != other.dtype:
        detail = f"{mine.dtype} and {other.dtype}"
        return Difference(name=name, kind="type", detail=detail)
    if mine.shape != other.shape:
        detail = f"{list(mine.shape)} and {list(other.shape)}"
        return Difference(name=name, kind="shape", detail=detail)
    if hash_windows(a.windows(name)) != hash_windows(b.windows(name)):
        return Difference(name=name, kind="elements")
    return None


def _diff_state(a: dict[str, Json], b: dict[str, Json]) -> list[Difference]:
    return [
        Difference(name=f"state.{key}", kind="state")
        for key in sorted(a.keys() | b.keys())
        if key not in a or key not in b or a[key] != b[key]
    ]
