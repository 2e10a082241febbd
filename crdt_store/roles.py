"""Roles, and the one table of which keys each may write.

A pattern is matched segment by segment: ``<self>`` is the writer's own PeerId, ``*``
one arbitrary segment. A slot has one writer (its author is part of it), so a shared key
such as ``j/*/st`` means "may publish a slot of its own there"; what a reader makes of
several slots is the view's business (:mod:`crdt_store.views`).
"""

from __future__ import annotations

from enum import StrEnum

SELF = "<self>"


class Role(StrEnum):
    """What a member is trusted to do."""

    OWNER = "owner"
    ADMIN = "admin"
    WORKER = "worker"
    CLIENT = "client"
    RELAY = "relay"
    VERIFIER = "verifier"


ROOT_RANK = 4
"""The root key stands above every role."""
RANK = {
    Role.OWNER: 3,
    Role.ADMIN: 2,
    Role.WORKER: 1,
    Role.CLIENT: 1,
    Role.RELAY: 1,
    Role.VERIFIER: 1,
}
"""Authority flows strictly downwards: a signer must outrank whom it grants or revokes.

This makes the evaluation of grants and revocations free of cycles.
"""

INVITABLE = frozenset({Role.WORKER, Role.CLIENT, Role.RELAY, Role.VERIFIER})
"""Roles an invite may carry: never owner or admin, and never the right to delegate."""

_CLIENT = (f"m/{SELF}", "j/*/spec", "j/*/st", f"d/*/{SELF}/*")
_RELAY = (f"m/{SELF}",)
_VERIFIER = (f"m/{SELF}", f"t/*/{SELF}")
_WORKER = (
    *_CLIENT,
    "a/*/*",
    f"p/*/{SELF}",
    f"l/*/{SELF}",
    "c/*/*",
    f"t/*/{SELF}",
)
WRITES: dict[Role, tuple[str, ...]] = {
    Role.OWNER: _WORKER,
    Role.ADMIN: _WORKER,
    Role.WORKER: _WORKER,
    Role.CLIENT: _CLIENT,
    Role.RELAY: _RELAY,
    Role.VERIFIER: _VERIFIER,
}
"""The table. Keys below ``0/`` and ``inv/`` have rules of their own (authority.py)."""

_Pattern = tuple[str, ...]


def _by_shape(rows: tuple[str, ...]) -> dict[tuple[str, int], list[_Pattern]]:
    """Return the rows by table and number of segments: keys are judged often."""
    found: dict[tuple[str, int], list[_Pattern]] = {}
    for row in rows:
        table, *rest = row.split("/")
        found.setdefault((table, len(rest)), []).append(tuple(rest))
    return found


_SHAPES = {role: _by_shape(rows) for role, rows in WRITES.items()}


def may_write(role: Role, writer: str, key: str) -> bool:
    """Return whether ``writer``, as ``role``, may have a slot at ``key``."""
    table, *segments = key.split("/")
    for pattern in _SHAPES[role].get((table, len(segments)), ()):
        for want, got in zip(pattern, segments, strict=True):
            if (
                want != got
                and (want != "*" or not got)
                and (want != SELF or got != writer)
            ):
                break
        else:
            return True
    return False
