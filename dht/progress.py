"""How far a fetch is, as the service, the control API and people are told."""

from __future__ import annotations

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """How far a download is.

    Attributes:
        num_held: Blocks that are here.
        num_blocks: Of so many; 0 before their number is known.
        num_sources: Peers that blocks are asked of now.
        waited_seconds: For how long every holder has been out of reach; 0 while one is
            there.
    """

    num_held: int = 0
    num_blocks: int = 0
    num_sources: int = 0
    waited_seconds: float = 0.0
