"""What the heads of all runs ask the mesh to hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from checkpoints.mesh.replicas import Want
from crdt_store.views import CheckpointHead
from fabric.core.digest import BLOCK_BYTES
from fabric.core.ids import BlobId


def wants_of(newest: Mapping[str, Mapping[int, CheckpointHead]]) -> list[Want]:
    """Return the wanted copies of all runs' heads.

    A checkpoint with pieces, any k of which restore it, also asks for each of these.
    """
    found: dict[BlobId, Want] = {}
    for run, heads in newest.items():
        for step, head in heads.items():
            for want in _of_head(run, step, head):
                known = found.setdefault(want.root, want)
                if known.copies < want.copies:
                    found[want.root] = want
    return list(found.values())


def _of_head(run: str, step: int, head: CheckpointHead) -> list[Want]:
    hints = frozenset({head.writer})
    pieces = tuple(map(BlobId, head.pieces))
    data, extra = code_of(head)
    if len(pieces) != data + extra:
        pieces = ()  # not made yet, or nonsense
    whole = Want(
        BlobId(head.root),
        run,
        step,
        head.bytes,
        head.copies,
        hints,
        pieces=pieces,
        needed=data if pieces else 0,
    )
    size = piece_bytes(head.bytes, data)
    siblings = frozenset(pieces)
    return [whole] + [
        Want(piece, run, step, size, 1, hints, siblings=siblings) for piece in pieces
    ]


def code_of(head: CheckpointHead) -> tuple[int, int]:
    """Return (k, m) of a head; (0, 0) if it has none, or nonsense."""
    data, plus, extra = head.erasure.partition("+")
    if not (plus and data.isdecimal() and extra.isdecimal()):
        return 0, 0
    return int(data), int(extra)


def piece_bytes(size: int, data: int) -> int:
    """Return the bytes of one of the pieces of ``size`` bytes, about."""
    blocks = -(-size // BLOCK_BYTES) + 1
    return -(-blocks // max(1, data)) * BLOCK_BYTES
