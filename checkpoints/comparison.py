"""How two checkpoints of any formats differ, bit by bit, under canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from checkpoints.dtypes import tensor_bytes
from checkpoints.formats.registry import open_source
from checkpoints.formats.source import Source
from checkpoints.hashed_file import hash_windows
from checkpoints.manifest import Json
from checkpoints.progress import Progress, no_progress


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


def diff_checkpoints(
    first: Path,
    second: Path,
    *,
    tensors_only: bool = False,
    on_progress: Progress = no_progress,
) -> DiffReport:
    """Return how two checkpoints differ: element bytes, types, shapes, names, state.

    How the elements are cut into chunks and files does not matter, nor the format.
    Reads both in bounded memory; canonical bytes are verified on the way.

    Raises:
        ConfigError: one is missing.
        IntegrityError: one is damaged.
    """
    with open_source(first) as a, open_source(second) as b:
        differences = [
            Difference(name=name, kind=kind)
            for kind, mine, other in (
                ("only_in_first", a, b),
                ("only_in_second", b, a),
            )
            for name in sorted(set(mine.names()) - set(other.names()))
        ]
        common = sorted(set(a.names()) & set(b.names()))
        total = sum(_size(a, name) for name in common)
        done = 0
        for name in common:
            difference = _diff_tensor(a, b, name)
            if difference is not None:
                differences.append(difference)
            done += _size(a, name)
            on_progress(done, total)
        if not tensors_only:
            differences += _diff_state(a.state, b.state)
        return DiffReport(
            first=str(a.path),
            second=str(b.path),
            same=not differences,
            compared_tensors=len(common),
            differences=differences,
        )


def _size(source: Source, name: str) -> int:
    entry = source.entry(name)
    return tensor_bytes(entry.dtype, entry.shape)


def _diff_tensor(a: Source, b: Source, name: str) -> Difference | None:
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


def _diff_state(a: Mapping[str, Json], b: Mapping[str, Json]) -> list[Difference]:
    return [
        Difference(name=f"state.{key}", kind="state")
        for key in sorted(a.keys() | b.keys())
        if key not in a or key not in b or a[key] != b[key]
    ]
