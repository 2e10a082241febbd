"""What the daemon says of a job's board."""

from __future__ import annotations

import msgspec


class BoardLine(msgspec.Struct, frozen=True):
    """A note or tag, and who wrote it when."""

    peer: str
    name: str
    time: float
    text: str


class OverrideView(msgspec.Struct, frozen=True):
    """A setting somebody changed.

    Attributes:
        value: None: as submitted.
        stands: It is what the coordinator puts into the next round.
        refused: Why it does not count, or empty.
    """

    peer: str
    name: str
    time: float
    path: str
    value: float | None
    stands: bool
    refused: str = ""


class BoardView(msgspec.Struct, frozen=True):
    """What ``fabric board`` shows, oldest first."""

    job: str
    notes: tuple[BoardLine, ...]
    tags: tuple[BoardLine, ...]
    overrides: tuple[OverrideView, ...]
