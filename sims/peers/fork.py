"""Copies of a replica that share what neither has changed.

A thousand peers that start with the same two thousand entries would cost gigabytes and
minutes. A fork behaves as a deep copy: its large dictionaries are :class:`Overlay` s
that read from the original, which must not change any more, and keep their own changes.
Nothing is assumed about the classes copied but that their state is in their attributes.
"""

# ruff: noqa: ANN401 - copies anything
from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

import msgspec
from typing_extensions import override

from crdt_store.memory_storage import MemoryStorage
from crdt_store.replica import Replica

T = TypeVar("T")
_SMALL = 8
"""A dictionary up to this size is copied: an overlay would be larger."""
_GONE = object()
_PLAIN = (list, set, deque, Counter)


class Overlay(MutableMapping[Any, Any]):
    """A dictionary above one that does not change.

    Mutable values of the base are copied when they are first looked at.
    """

    __slots__ = ("_base", "_default", "_length", "_own")

    def __init__(
        self, base: dict[Any, Any], default: Callable[[], Any] | None = None
    ) -> None:
        self._base = base
        self._default = default
        self._own: dict[Any, Any] = {}
        self._length = len(base)

    @override
    def __getitem__(self, key: Any) -> Any:
        found = self._own.get(key, self)
        if found is self:
            found = self._base.get(key, _GONE)
            if type(found) in _MUTABLE:
                found = self._own[key] = _copy(found, {})
        if found is _GONE:
            if self._default is None:
                raise KeyError(key)
            found = self._default()
            self[key] = found
        return found

    @override
    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    @override
    def __contains__(self, key: object) -> bool:
        found = self._own.get(key, self)
        return key in self._base if found is self else found is not _GONE

    @override
    def __setitem__(self, key: Any, value: Any) -> None:
        self._length += key not in self
        self._own[key] = value

    @override
    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self._length -= 1
        if key in self._base:
            self._own[key] = _GONE
        else:
            del self._own[key]

    @override
    def __iter__(self) -> Iterator[Any]:
        own, base = self._own, self._base
        for key in base:
            if own.get(key) is not _GONE:
                yield key
        for key, value in list(own.items()):
            if value is not _GONE and key not in base:
                yield key

    @override
    def __len__(self) -> int:
        return self._length

    @override
    def clear(self) -> None:
        self._base, self._own, self._length = {}, {}, 0


_MUTABLE = frozenset({dict, defaultdict, Overlay, *_PLAIN})


def _copy(value: Any, copied: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _MUTABLE or _is_stateful(value):
        if id(value) not in copied:
            copied[id(value)] = _copy_mutable(value, copied)
        return copied[id(value)]
    return value


def _copy_mutable(value: Any, copied: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in (dict, defaultdict):
        default = getattr(value, "default_factory", None)
        if len(value) > _SMALL or default is not None:
            return Overlay(value, default)
        return {key: _copy(item, copied) for key, item in value.items()}
    if kind is list:
        return (
            [_copy(item, copied) for item in value]
            if _holds_mutable(value)
            else (value[:])
        )
    if kind in _PLAIN:
        return value.copy()
    assert kind is not Overlay, "fork the original, not a fork"
    return _copy_object(value, copied)


def _holds_mutable(items: list[Any]) -> bool:
    return bool(items) and type(items[0]) in _MUTABLE


def _is_stateful(value: Any) -> bool:
    kind = type(value)
    if not kind.__module__.startswith(("crdt_store.", "fabric.")):
        return False
    if issubclass(kind, msgspec.Struct | str | bytes | int):
        return False
    return not (is_dataclass(kind) and kind.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def _copy_object(value: Any, copied: dict[int, Any]) -> Any:
    clone = copied[id(value)] = object.__new__(type(value))
    state = getattr(value, "__dict__", None)
    if state is None:
        state = {name: getattr(value, name) for name in type(value).__slots__}
    for name, item in state.items():
        object.__setattr__(clone, name, _copy(item, copied))
    return clone


def fork_replica(original: Replica, own: bytes) -> Replica:
    """Return a replica of the peer with public key ``own`` in the same state."""
    clone: Replica = _copy(original, {})
    vars(clone)["_own"] = own
    return clone


def fork_storage(original: MemoryStorage) -> MemoryStorage:
    """Return a disk with the same content."""
    clone: MemoryStorage = _copy(original, {})
    return clone
