"""What the control API answers about content and checkpoints."""

from __future__ import annotations

import msgspec


class ContentRow(msgspec.Struct, frozen=True):
    """One piece of content held here.

    Attributes:
        copies: Peers known to hold it, if it is a checkpoint; -1: not known.
        wanted: Peers that should hold it; 0: it is no checkpoint.
    """

    root: str
    name: str
    bytes: int
    pinned: bool
    copies: int = -1
    wanted: int = 0


class FetchedView(msgspec.Struct, frozen=True):
    """A checkpoint that was fetched.

    Attributes:
        root: Of the checkpoint that was written.
        step: Its number.
        tensors: Tensors and aliases in it.
        needed_bytes: Bytes of the blocks it took.
        total_bytes: Bytes of the whole checkpoint.
        path: Where it is.
    """

    root: str
    step: int
    tensors: int
    needed_bytes: int
    total_bytes: int
    path: str
