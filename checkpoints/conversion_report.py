"""What a conversion did with every tensor: nothing is dropped in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import msgspec

from checkpoints.boxes import tiling_fault
from checkpoints.formats.sink import Bundle, Plan
from checkpoints.formats.source import Ignored, Source
from checkpoints.mapping import Mapped
from checkpoints.views import Piece, View
from fabric.core.errors import LocalProtocolError

Action = Literal["copied", "renamed", "split", "merged", "tied", "cast", "ignored"]


class TensorOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor or alias of the source.

    Attributes:
        source: Its name there.
        action: "copied"; "renamed": the same elements under another name, perhaps
            turned; "split": over several tensors; "merged": part of a larger one;
            "tied": the target stores it under another name; "cast": to another element
            type; "ignored".
        targets: Names in the target.
        turned: Axes are in another order there.
        dtype: Element type in the target, if it was cast.
        reason: Why it was ignored, or what else there is to know.
    """

    source: str
    action: Action
    targets: tuple[str, ...] = ()
    turned: bool = False
    dtype: str = ""
    reason: str = ""


class WrittenTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the target.

    Attributes:
        name: Canonical name.
        dtype: Element type.
        shape: Its shape.
        size_bytes: Bytes of its elements.
        files: Files that hold them.
        blake3: Hash of its bytes, row-major, equal on both sides; of a tensor that was
            cut for ranks the hashes of its boxes, joined by "+".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    files: tuple[str, ...] = ()
    blake3: str = ""


class PlannedOutput(msgspec.Struct, frozen=True):
    """A file that is or would be written."""

    path: str
    size_bytes: int
    tensors: int


class ConversionReport(msgspec.Struct, kw_only=True):
    """The whole conversion.

    Attributes:
        verified: The target was read again and every tensor is the source's, bit by
            bit, after the maps and casts that were asked for.
        dry_run: Nothing was written.
        resumed_files: Files of a run that was cut off, kept.
        root: Root of the canonical target, or source.
        tensors: Every tensor and alias of the source.
        written: Every tensor of the target.
        ignored: Whatever else the target does not hold, and why.
        maps: Name maps applied, in order.
        notes: What a person should know.
    """

    source: str
    source_format: str
    target: str
    to: str
    root: str = ""
    verified: bool = False
    dry_run: bool = False
    resumed_files: int = 0
    copied_bytes: int = 0
    seconds: float = 0.0
    files: list[PlannedOutput] = []
    tensors: list[TensorOutcome] = []
    written: list[WrittenTensor] = []
    ignored: list[Ignored] = []
    maps: list[str] = []
    notes: list[str] = []


def outcomes(
    source: Source, mapped: Mapped, bundle: Bundle, plan: Plan
) -> list[TensorOutcome]:
    """Return what becomes of every tensor and alias of ``source``.

    Raises:
        LocalProtocolError: elements would be lost without a word: a bug.
    """
    left_out = {each.name: each.reason for each in plan.ignored}
    left_out |= {each.name: each.reason for each in mapped.ignored}
    uses: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for target, view in mapped.views.items():
        for piece in view.pieces:
            uses[piece.source].append((target, piece))
    return [
        _outcome(name, source, uses[name], mapped, bundle, plan, left_out)
        for name in source.names()
    ]


def _outcome(
    name: str,
    source: Source,
    uses: list[tuple[str, Piece]],
    mapped: Mapped,
    bundle: Bundle,
    plan: Plan,
    left_out: Mapping[str, str],
) -> TensorOutcome:
    reason = left_out.get(name, "")
    targets = tuple(dict.fromkeys(target for target, _ in uses))
    kept = tuple(target for target in targets if target not in left_out)
    if not uses and name in mapped.copies:
        target = mapped.copies[name]
        same = f"equal to what {target} keeps"
        return TensorOutcome(
            source=name, action="merged", targets=(target,), reason=same
        )
    if not kept:
        why = reason or next((left_out[t] for t in targets if t in left_out), "")
        if not why and 0 not in source.entry(name).shape:
            raise LocalProtocolError(f"{name!r} would be dropped in silence")
        return TensorOutcome(source=name, action="ignored", reason=why or "empty")
    _check_coverage(name, source, uses, reason, mapped)
    tied = {**bundle.aliases, **plan.tied}
    if len(kept) == 1 and kept[0] in tied:
        if any(kept[0] in file.tensors for file in plan.files):
            reason = "tied in the source, stored twice"
            return TensorOutcome(
                source=name, action="copied", targets=kept, reason=reason
            )
        return TensorOutcome(source=name, action="tied", targets=(tied[kept[0]],))
    views = [mapped.views[target] for target in kept]
    cast = bundle.tensors[kept[0]].dtype if kept[0] in bundle.tensors else ""
    action = _action(name, kept, views)
    is_cast = bool(cast) and cast != source.entry(name).dtype
    return TensorOutcome(
        source=name,
        action="cast" if is_cast and action == "copied" else action,
        targets=kept,
        turned=any(piece.turned for _, piece in uses),
        dtype=cast if is_cast else "",
        reason=reason,
    )


def _action(name: str, kept: tuple[str, ...], views: list[View]) -> Action:
    if len(kept) > 1:
        return "split"
    if len(views[0].sources) > 1:
        return "merged"
    return "copied" if kept[0] == name else "renamed"


def _check_coverage(
    name: str,
    source: Source,
    uses: list[tuple[str, Piece]],
    reason: str,
    mapped: Mapped,
) -> None:
    """Pass if every element goes somewhere, or the report says why not."""
    entry = source.entry(name)
    boxes = [piece.box for _, piece in uses if piece.box.volume]
    fault = tiling_fault(entry.shape, boxes)
    if fault is None or (fault.covered == 0 and reason):
        return
    if fault.covered > 1 and (entry.shape in {(), (1,)} or name in mapped.copies):
        return  # one value for a parameter that was split
    raise LocalProtocolError(f"{name!r}: element {list(fault.at)} is used wrongly")
