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

_SPLIT = {role: tuple(p.split("/") for p in rows) for role, rows in WRITES.items()}


def may_write(role: Role, writer: str, key: str) -> bool:
    """Return whether ``writer``, as ``role``, may have a slot at ``key``."""
    segments = key.split("/")
    return any(
        len(pattern) == len(segments)
        and all(
            want == got
            or (want == "*" and got != "")
            or (want == SELF and got == writer)
            for want, got in zip(pattern, segments, strict=True)
        )
        for pattern in _SPLIT[role]
    )
