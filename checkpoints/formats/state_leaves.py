"""Nested state, as programs save it, and its leaves with their paths.

A path has a text for a dictionary's key and a number for a place in a list, which is
how torch's distributed checkpoints write it down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import msgspec

from checkpoints.formats.pickle_values import Global, Record, StorageRef, TensorRef
from checkpoints.manifest import MAX_STATE_DEPTH, Json
from fabric.core.errors import IntegrityError

Path = tuple[str | int, ...]

NAMESPACE = Global("argparse", "Namespace")
_PATHS = ("pathlib", "pathlib._local")


class NotJson(Exception):
    """A value that is not carried over; the text says why."""


class EmptyDict(msgspec.Struct, frozen=True):
    """A leaf: a dictionary without entries."""


def leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Yield the leaves of what a pickle was read into, depth first.

    Dictionaries are opened always, lists and tuples only if a tensor or a dictionary is
    somewhere in them: a list of numbers is one leaf.
    """
    if isinstance(value, Record) and value.kind == NAMESPACE:
        value = value.state or {}  # the arguments of a program, each a value of its own
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, _text(key)))
    elif isinstance(value, list | tuple) and not _is_plain(value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, dict):
        yield path, EmptyDict()
    else:
        yield path, value


def _is_plain(value: list[object] | tuple[object, ...]) -> bool:
    if isinstance(value, Global):
        return True
    return not any(
        isinstance(item, TensorRef | dict | Record)
        or (isinstance(item, list | tuple) and not _is_plain(item))
        for item in value
    )


def _text(key: object) -> str:
    """Return a key as torch's flattening writes it."""
    return key if isinstance(key, str) else str(key)[:200]


def to_json(value: object, depth: int = 0) -> Json:
    """Return ``value``, read from a pickle, as JSON.

    Tuples become lists, keys that are numbers become text, names of types (such as
    ``torch.float32``), devices and paths become text.

    Raises:
        NotJson: it has no JSON form.
    """
    if depth > MAX_STATE_DEPTH:
        raise NotJson(f"nested deeper than {MAX_STATE_DEPTH}")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, list | tuple):
        return [to_json(item, depth + 1) for item in value]
    if isinstance(value, Mapping | EmptyDict):
        return _object(value if isinstance(value, Mapping) else {}, depth)
    if isinstance(value, Record):
        return _record(value)
    what = (
        "tensor" if isinstance(value, TensorRef | StorageRef) else type(value).__name__
    )
    raise NotJson(f"{what} has no JSON form")


def _number(value: float) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        raise NotJson(f"{value} has no JSON form")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise NotJson(f"an integer of {value.bit_length()} bits")
    return value


def _object(value: Mapping[object, object], depth: int) -> Json:
    result: dict[str, Json] = {}
    for key, item in value.items():
        if not isinstance(key, str | int):
            raise NotJson(f"a {type(key).__name__} as a key")
        if str(key) in result:
            raise NotJson(f"two keys that are both {str(key)!r} as text")
        result[str(key)] = to_json(item, depth + 1)
    return result


def _record(value: Record) -> Json:
    if value.kind.module in _PATHS:
        return "/".join(map(str, value.args)).replace("//", "/")
    if value.kind == Global("torch", "device"):
        return ":".join(map(str, value.args))
    raise NotJson(f"an object of class {str(value.kind)[:200]}")


def gather(found: Mapping[Path, Json]) -> dict[str, Json]:
    """Return nested JSON with each value at its path; the inverse of :func:`leaves`.

    What was a list becomes one if all its places have something, else an object.

    Raises:
        IntegrityError: a value is said to be inside another one.
    """
    tree: dict[str | int, object] = {}
    for path, value in found.items():
        at = tree
        for step in path[:-1]:
            below = at.setdefault(step, {})
            if not isinstance(below, dict):
                raise _crossed(path)
            at = below
        if not path or path[-1] in at:
            raise _crossed(path)
        at[path[-1]] = _Leaf(value)
    closed = _close(tree)
    assert isinstance(closed, dict)
    return closed


def _crossed(path: Path) -> IntegrityError:
    return IntegrityError(
        f"two values at {'.'.join(map(str, path))[:200]!r}",
        code="E_NAME",
        next_step="the index is damaged or hostile: use another copy",
    )


class _Leaf(msgspec.Struct, frozen=True):
    value: Json


def _close(tree: object) -> Json:
    if isinstance(tree, _Leaf):
        return tree.value
    assert isinstance(tree, dict)
    if tree and set(tree) == set(range(len(tree))):
        return [_close(tree[index]) for index in range(len(tree))]
    return {str(key): _close(item) for key, item in tree.items()}
