"""What the heads of all runs ask the mesh to hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from checkpoints.mesh.replicas import Want
from crdt_store.views import CheckpointHead
from fabric.core.ids import BlobId


def wants_of(newest: Mapping[str, Mapping[int, CheckpointHead]]) -> list[Want]:
    """Return the wanted copies of all runs' heads.

    Once there are pieces, any k of which restore the checkpoint, one whole copy is
    enough; each piece is held once, by another peer where there are enough.
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
    whole = 1 if head.pieces else head.copies
    root = BlobId(head.root)
    wants = [Want(root, run, step, head.bytes, whole, hints)]
    pieces = frozenset(map(BlobId, head.pieces))
    data = int(head.erasure.partition("+")[0] or 1)
    size = -(-head.bytes // data)
    wants += [
        Want(piece, run, step, size, 1, hints, apart_from=pieces - {piece})
        for piece in sorted(pieces)
    ]
    return wants
