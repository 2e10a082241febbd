"""The shape of what a pickle was read into: a tree that is safe to walk."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from checkpoints.formats.pickle_values import Global, OrderedRecord, Record, refuse


def check_tree(root: object, max_depth: int, max_nodes: int) -> None:
    """Pass if ``root`` is a tree of bounded depth and size.

    Parts that are shared count each time they are met: a value of a hundred lists,
    each holding the next one twice, would take for ever to walk.

    Raises:
        IntegrityError: it holds itself, or is deeper or larger.
    """
    known: dict[int, tuple[int, int]] = {}  # id -> depth, nodes; 0, 0 while open
    stack: list[tuple[object, bool]] = [(root, False)]
    while stack:
        value, whole = stack.pop()
        if whole:
            below = [known.get(id(child), (0, 1)) for child in _children(value)]
            depth = 1 + max((each[0] for each in below), default=0)
            nodes = 1 + sum(each[1] for each in below)
            if depth > max_depth or nodes > max_nodes:
                raise refuse("nested deeper or larger than any index")
            known[id(value)] = depth, nodes
        elif id(value) not in known:
            known[id(value)] = 0, 0
            stack.append((value, True))
            stack += [(each, False) for each in _children(value) if _is_parent(each)]
        elif known[id(value)] == (0, 0):
            raise refuse("a value that holds itself")


def _is_parent(value: object) -> bool:
    return isinstance(
        value, list | tuple | dict | set | frozenset | Record
    ) and not isinstance(value, Global)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Record):
        return (value.args, value.state)
    if isinstance(value, OrderedRecord):
        return chain(value, value.values(), (value.attributes,))
    if isinstance(value, dict):
        return chain(value, value.values())
    if isinstance(value, list | tuple | set | frozenset) and _is_parent(value):
        return value
    return ()
