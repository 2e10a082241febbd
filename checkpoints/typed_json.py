"""Python values as JSON and back, exactly, or a refusal: never pickle.

JSON has no tuples, no bytes, no keys but strings, no infinities. Those are written as
an object with one key that starts with "$": ``{"$tuple": [...]}``. A dict that has such
a key of its own is written as ``{"$dict": [[key, value], ...]}``, so that reading back
is never ambiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from checkpoints.manifest import MAX_STATE_DEPTH, Json
from fabric.core.errors import ConfigError, IntegrityError

Leaf = Callable[[object, str], Json]
"""Given a value and its path; returns the body of ``{"$x": body}`` or None."""

_INT64 = 1 << 63


def to_json(value: object, where: str = "state", leaf: Leaf | None = None) -> Json:
    """Return ``value`` as JSON that :func:`from_json` turns back into an equal one.

    Args:
        value: Nested None, bool, int, float, str, bytes, list, tuple, dict.
        where: Its name, for the message of a refusal.
        leaf: Asked first about each value that is not one of these types; returns JSON
            (an object with one "$" key) or None to refuse.

    Raises:
        ConfigError: something else (``E_NOT_JSON``), which the message names.
    """
    return _Encoder(leaf).encode(value, where, 0)


class _Encoder:
    def __init__(self, leaf: Leaf | None) -> None:
        self._leaf = leaf

    def encode(self, value: object, where: str, depth: int) -> Json:
        if depth > MAX_STATE_DEPTH // 2:
            raise _refused(where, "nested too deep")
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if isinstance(value, int | float) and kind in (int, float):
            return _number(value)
        if kind is bytes:
            return {"$bytes": value.hex()}  # type: ignore[attr-defined]
        if isinstance(value, list | tuple) and kind in (list, tuple):
            items = [
                self.encode(v, f"{where}[{k}]", depth + 1) for k, v in enumerate(value)
            ]
            return items if kind is list else {"$tuple": items}
        if isinstance(value, Mapping):
            return self._mapping(value, where, depth)
        special = self._leaf(value, where) if self._leaf else None
        if special is None:
            raise _refused(where, f"a {kind.__module__}.{kind.__qualname__}")
        return special

    def _mapping(self, value: Mapping[object, object], where: str, depth: int) -> Json:
        if all(type(k) is str and not k.startswith("$") for k in value):
            return {
                str(k): self.encode(v, f"{where}.{k}", depth + 1)
                for k, v in value.items()
            }
        pairs = [
            [
                self.encode(k, where, depth + 1),
                self.encode(v, f"{where}.{k}", depth + 1),
            ]
            for k, v in value.items()
        ]
        return {"$dict": pairs}


def _number(value: float) -> Json:
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else {"$int": hex(value)}
    return value if math.isfinite(value) else {"$float": repr(value)}


def _refused(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where} is {what}: it has no JSON form",
        code="E_NOT_JSON",
        next_step="save it as a tensor, number, text, list or dict, or leave it out",
    )


def from_json(value: Json, leaf: Callable[[str, Json], object] | None = None) -> object:
    """Return what :func:`to_json` was given.

    Args:
        value: Its result, from a manifest.
        leaf: Given the "$" key and body of what an own leaf wrote.

    Raises:
        IntegrityError: not a result of :func:`to_json` (``E_STATE``).
    """
    if isinstance(value, list):
        return [from_json(item, leaf) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (key := next(iter(value))).startswith("$"):
        try:
            return _special(key, value[key], leaf)
        except (TypeError, ValueError, AttributeError) as exc:
            raise _bad(key) from exc
    return {key: from_json(item, leaf) for key, item in value.items()}


def _special(
    key: str, body: Json, leaf: Callable[[str, Json], object] | None
) -> object:
    match key:
        case "$tuple":
            return tuple(from_json(item, leaf) for item in body)
        case "$bytes":
            return bytes.fromhex(body)
        case "$int":
            return int(body, 16)
        case "$float":
            return float(body)
        case "$dict":
            return {from_json(k, leaf): from_json(v, leaf) for k, v in body}
        case _:
            if leaf is None:
                raise _bad(key)
            return leaf(key, body)


def _bad(key: str) -> IntegrityError:
    return IntegrityError(f"state: {key[:40]!r} cannot be read", code="E_STATE")
