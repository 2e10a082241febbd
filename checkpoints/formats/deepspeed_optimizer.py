"""The tensors of a ZeRO optimizer: fp32 weights, moments, steps."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from checkpoints.formats.deepspeed_files import SAME_SAVE, Loaded, same
from checkpoints.formats.deepspeed_groups import Group, RankState
from checkpoints.formats.deepspeed_layout import INCOMPLETE, flat_tensor
from checkpoints.formats.extent_source import StoredTensor, open_regular
from checkpoints.formats.source import OPTIMIZER, Ignored
from checkpoints.formats.state_leaves import NotJson, to_json
from checkpoints.manifest import Json
from fabric.core.errors import IntegrityError

_NUMBERS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}


class OptimizerTensors(msgspec.Struct):
    """What the ranks' files give.

    Attributes:
        masters: Name of a parameter -> its fp32 weights.
        tensors: Canonical name -> optimizer state.
        state: ``param_groups``, and values that are the same for all parameters.
        ignored: What is not carried over.
        step: The largest step that a parameter is at; None if none is known.
    """

    masters: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    tensors: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    state: dict[str, Json] = msgspec.field(default_factory=dict)
    ignored: list[Ignored] = msgspec.field(default_factory=list)
    step: float | None = None


def read_optimizer(
    tag: Path, ranks: Mapping[int, RankState], groups: Sequence[Group]
) -> OptimizerTensors:
    """Return the optimizer's tensors, each whole.

    Raises:
        IntegrityError: ranks that disagree (``E_MIXED``), a rank without a state that
            others have (``E_GAP``).
    """
    found = OptimizerTensors()
    for group in groups:
        _add_group(found, tag, ranks, group)
    same("param_groups", {each.loaded.file: each.options for each in ranks.values()})
    if ranks[0].options is None:
        found.ignored.append(
            Ignored("param_groups", "not in an elastic checkpoint: set the options")
        )
    else:
        found.state["param_groups"] = _param_groups(found, ranks[0], groups)
    return found


def _add_group(
    found: OptimizerTensors, tag: Path, ranks: Mapping[int, RankState], group: Group
) -> None:
    for name, shape in group.shapes.items():
        if name in found.masters:
            raise ranks[0].loaded.refuse(f"{name[:200]!r} is in two groups")
        fragments = group.fragments[name]
        found.masters[name] = flat_tensor(name, shape, fragments, group.masters)
    for slot, parts in group.slots.items():
        _check_all(ranks, group, slot, parts)
        for name, shape in group.shapes.items():
            stored = flat_tensor(name, shape, group.fragments[name], parts)
            found.tensors[f"{OPTIMIZER}{slot}/{name}"] = stored
    for slot, scalars in group.scalars.items():
        _check_all(ranks, group, slot, scalars)
        value = _one_value(tag, slot, scalars)
        if slot == "step":
            found.step = max(found.step or 0.0, value)
        for name in group.shapes:
            found.tensors[f"{OPTIMIZER}{slot}/{name}"] = scalars[min(scalars)]
    for slot, numbers in group.numbers.items():
        _check_all(ranks, group, slot, numbers)
        _add_number(found, group, slot, numbers)
    if not (group.slots or group.scalars or group.numbers):
        found.ignored += [
            Ignored(f"{OPTIMIZER}{name}", "no moments: it was never updated")
            for name in group.shapes
        ]


def _check_all(
    ranks: Mapping[int, RankState], group: Group, slot: str, parts: Iterable[int]
) -> None:
    missing = sorted(set(group.masters) - set(parts))
    # a rank that has no element of the group has no state to save
    missing = [rank for rank in missing if group.masters[rank].size]
    if missing:
        raise IntegrityError(
            f"{ranks[missing[0]].loaded.file}: no {slot!r} of group {group.index}, "
            "which other ranks have",
            code="E_GAP",
            next_step=INCOMPLETE,
        )


def _one_value(tag: Path, slot: str, scalars: Mapping[int, StoredTensor]) -> float:
    """Return the value that all ranks have.

    Raises:
        IntegrityError: they differ: these are files of two saves (``E_MIXED``).
    """
    values = {rank: _scalar(tag, stored) for rank, stored in scalars.items()}
    first = min(values)
    for rank, value in values.items():
        if value != values[first]:
            raise IntegrityError(
                f"{slot!r} is {values[first]} on rank {first} and {value} on {rank}",
                code="E_MIXED",
                next_step=SAME_SAVE,
            )
    return values[first]


def _scalar(tag: Path, stored: StoredTensor) -> float:
    (extent,) = stored.extents
    layout = _NUMBERS.get(stored.dtype)
    if layout is None:
        raise IntegrityError(f"{extent.file}: a step of {stored.dtype}", code="E_DTYPE")
    fd = open_regular(tag, extent.file)
    try:
        data = os.pread(fd, struct.calcsize(layout), extent.begin)
    finally:
        os.close(fd)
    value: float = struct.unpack(layout, data)[0]
    return value


def _add_number(
    found: OptimizerTensors, group: Group, slot: str, numbers: Mapping[int, object]
) -> None:
    value = numbers[min(numbers)]
    if any(each != value for each in numbers.values()):
        raise IntegrityError(
            f"{slot!r} of group {group.index} differs between ranks",
            code="E_MIXED",
            next_step=SAME_SAVE,
        )
    if slot == "step" and isinstance(value, int | float):
        found.step = max(found.step or 0.0, value)
    try:
        carried = to_json(value)
    except NotJson as error:
        found.ignored.append(Ignored(f"{OPTIMIZER}{slot}", str(error)))
        return
    values = found.state.setdefault("state", {})
    for name in group.shapes:
        values.setdefault(name, {})[slot] = carried


def _param_groups(
    found: OptimizerTensors, rank: RankState, groups: Sequence[Group]
) -> list[Json]:
    names: dict[int, list[str]] = {}
    for group in groups:
        names.setdefault(group.index, []).extend(group.shapes)
    options, ignored = named_groups(
        rank.loaded, rank.options, [names[index] for index in sorted(names)]
    )
    found.ignored += ignored
    return options


def named_groups(
    loaded: Loaded, value: object, names: Sequence[Sequence[str]]
) -> tuple[list[Json], list[Ignored]]:
    """Return the options of an optimizer's groups, with names for its numbers.

    Args:
        loaded: Where they are.
        value: The ``param_groups``; ``params`` counts the vectors of :mod:`layout
            <checkpoints.formats.deepspeed_layout>`.
        names: Parameters in each of these.
    """
    result: list[Json] = []
    ignored: list[Ignored] = []
    at = 0
    for index, options in enumerate(_dicts(loaded, value)):
        parts = options.get("params")
        end = at + (len(parts) if isinstance(parts, list) else 0)
        kept: dict[str, Json] = {}
        for key, each in options.items():
            try:
                kept[str(key)] = to_json(each)
            except NotJson as error:
                ignored.append(Ignored(f"param_groups.{index}.{key}", str(error)))
        params = [name for group in names[at:end] for name in group]
        result.append({**kept, "params": params})
        at = end
    return result, ignored


def _dicts(loaded: Loaded, value: object) -> list[Mapping[object, object]]:
    each = value if isinstance(value, list) else []
    return [loaded.mapping(item, "param_groups") for item in each]
