"""The flat space of a model's trainable parameters, and one rank's buffers of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from training.sharding import Cut, Piece


@dataclass(frozen=True)
class Space:
    """Names and shapes, unit by unit.

    Attributes:
        names: Of the tensors, in the order of the space.
        shapes: Of each.
        decayed: Whether weight decay is for it: it has more than one dimension.
        units: Tensors that FSDP2 gathers together; they follow each other.
        frozen: Of each unit, the shapes of what is not trained.
        aliases: Other names of tied tensors -> the name that is in ``names``.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    decayed: tuple[bool, ...]
    units: tuple[range, ...]
    frozen: tuple[tuple[tuple[int, ...], ...], ...]
    aliases: dict[str, str]


class Places:
    """Where the pieces of a cut lie in a buffer.

    Args:
        pieces: With the place of the first element of each.
    """

    def __init__(self, pieces: Iterable[tuple[Piece, int]]) -> None:
        self._found: dict[int, list[tuple[Piece, int]]] = {}
        for piece, at in pieces:
            self._found.setdefault(piece.tensor, []).append((piece, at))

    def of(self, piece: Piece) -> slice:
        """Return where a piece, or a part of one, lies."""
        for whole, at in self._found[piece.tensor]:
            if whole.begin <= piece.begin and piece.end <= whole.end:
                begin = at + piece.begin - whole.begin
                return slice(begin, begin + piece.numel)
        raise ValueError(f"{piece} is not in this buffer")


def packed(cut: Cut, start: int = 0) -> Places:
    """Return the places of pieces one after the other."""
    pieces, at = [], start
    for piece in cut:
        pieces.append((piece, at))
        at += piece.numel
    return Places(pieces)


def take(buffer: torch.Tensor, places: Places, cut: Cut) -> torch.Tensor:
    """Return the elements of ``cut``, copied one after the other."""
    return torch.cat([buffer[places.of(piece)] for piece in cut])


def add(buffer: torch.Tensor, places: Places, cut: Cut, values: torch.Tensor) -> None:
    """Add ``values``, one after the other, to the elements of ``cut``."""
    for piece, part in zip(cut, _split(values, cut), strict=True):
        buffer[places.of(piece)].add_(part)


def put(buffer: torch.Tensor, places: Places, cut: Cut, values: torch.Tensor) -> None:
    """Copy ``values``, one after the other, over the elements of ``cut``."""
    for piece, part in zip(cut, _split(values, cut), strict=True):
        buffer[places.of(piece)].copy_(part)


def spans(cut: Cut, units: Sequence[range]) -> list[tuple[int, int]]:
    """Return the begin and end of each unit in a packed buffer of ``cut``."""
    found, at = [], 0
    for unit in units:
        size = sum(piece.numel for piece in cut if piece.tensor in unit)
        found.append((at, at + size))
        at += size
    return found


def _split(values: torch.Tensor, cut: Cut) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = values.split([piece.numel for piece in cut])
    return parts
