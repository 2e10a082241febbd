"""Optimizer states: the fp32 master weights and AdamW's two moments, and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch.optim.adamw import adamw

from training.sharding import Cut, Piece


class Slab(NamedTuple):
    """States that are updated at one time: a part of one unit's.

    Attributes:
        unit: Number of the unit.
        begin: Place of the first element in the packed states.
        master: (n,) fp32 weights.
        first: (n,) fp32 first moments.
        second: (n,) fp32 second moments.
    """

    unit: int
    begin: int
    master: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


class States(Protocol):
    """Where a rank keeps its states."""

    def sweep(self) -> Iterator[Slab]:
        """Yield all states, unit by unit in order; changes are kept."""

    def slabs(self) -> list[Slab]:
        """Return views of all states, for loading and saving; until the next sweep."""

    def close(self) -> None:
        """Give memory and files back."""


class MemoryStates:
    """States in memory.

    Args:
        spans: Begin and end of each unit in the packed states.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._spans = list(spans)
        size = self._spans[-1][1] if self._spans else 0
        self._values = torch.zeros(3, size)

    def sweep(self) -> Iterator[Slab]:
        """Yield one slab per unit."""
        yield from self.slabs()

    def slabs(self) -> list[Slab]:
        """Return one slab per unit."""
        return [
            Slab(unit, begin, *self._values[:, begin:end])
            for unit, (begin, end) in enumerate(self._spans)
        ]

    def close(self) -> None:
        """Nothing is held but memory."""


class Owned(NamedTuple):
    """States of a piece of a tensor: views."""

    piece: Piece
    master: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


def owned(states: States, cut: Cut) -> Iterator[Owned]:
    """Yield the states of a rank by pieces of its cut, cut again where slabs end."""
    slabs = iter(states.slabs())
    slab = next(slabs, None)
    at = 0
    for piece in cut:
        begin = piece.begin
        while begin < piece.end:
            while slab is None or slab.begin + slab.master.numel() <= at:
                slab = next(slabs)
            place = at - slab.begin
            size = min(piece.end - begin, slab.master.numel() - place)
            part = slice(place, place + size)
            yield Owned(
                Piece(piece.tensor, begin, begin + size),
                slab.master[part],
                slab.first[part],
                slab.second[part],
            )
            begin, at = begin + size, at + size


class AdamW(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Decoupled weight decay (Loshchilov and Hutter 2019), as torch computes it.

    Attributes:
        learning_rate: Where a step names no other.
        betas: Decay of the two moments.
        epsilon: Added to the root of the second moment.
        weight_decay: Of tensors of two and more dimensions; others have none.
        grad_clip: Largest norm of all gradients together; 0 = no limit.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0


class Decays:
    """Runs of packed states that have the same weight decay.

    Args:
        cut: Of the states.
        decays: By tensor.
    """

    def __init__(self, cut: Cut, decays: Sequence[float]) -> None:
        self._runs: list[tuple[int, int, float]] = []
        at = 0
        for piece in cut:
            decay = decays[piece.tensor]
            end = at + piece.numel
            if self._runs and self._runs[-1][2] == decay:
                self._runs[-1] = (self._runs[-1][0], end, decay)
            else:
                self._runs.append((at, end, decay))
            at = end

    def of(self, begin: int, end: int) -> Iterator[tuple[int, int, float]]:
        """Yield the runs between two places, cut to them."""
        for first, last, decay in self._runs:
            low, high = max(first, begin), min(last, end)
            if low < high:
                yield low, high, decay


def update(
    slab: Slab,
    gradient: torch.Tensor,
    decays: Decays,
    hyper: AdamW,
    *,
    age: int,
    learning_rate: float,
) -> None:
    """Take one step with a slab.

    Args:
        slab: Changed in place.
        gradient: (n,) of the same elements, clipped.
        decays: Of all packed states.
        hyper: Moments and epsilon.
        age: Steps taken before.
        learning_rate: Of this step.
    """
    begin, end = slab.begin, slab.begin + gradient.numel()
    for low, high, decay in decays.of(begin, end):
        part = slice(low - begin, high - begin)
        adamw(
            [slab.master[part]],
            [gradient[part]],
            [slab.first[part]],
            [slab.second[part]],
            [],
            [torch.tensor(float(age))],
            fused=True,
            amsgrad=False,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            lr=learning_rate,
            weight_decay=decay,
            eps=hyper.epsilon,
            maximize=False,
        )
