"""Memory of a rank under a scheme, part by part, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from fabric.jobs.plan.ground import Ground, Rank
from fabric.jobs.plan.partitions import Partition
from fabric.jobs.plan.schemes import Memory, PlanSettings, Scheme, wire_bytes
from fabric.jobs.plan.shapes import ModelShape

MOMENTS = 8
"""Bytes per parameter of AdamW's two moments in fp32."""
MASTER = 4
"""Of the fp32 weights that the step is made on, where they are not the weights."""
OUTER = 8
"""Of an outer loop: the weights of the last round, and the momentum."""
RESIDUAL = 4
"""Of what quantising left over, added to the next pseudo-gradient."""
UNITS = 2
"""Units that are whole at once: one computes, the next one arrives."""


class Seat(NamedTuple):
    """Ranks that hold equal shares: how many share weights, gradients, states.

    Attributes:
        primary: How many share the weights that are gathered in the forward pass.
    """

    rank: Rank
    held: int
    reduced: int
    stepped: int
    primary: int


def seats_of(
    ground: Ground, parts: tuple[Partition, Partition, Partition, Partition]
) -> tuple[Seat, ...]:
    """Return the kinds of ranks there are, one of each.

    Args:
        ground: The ranks.
        parts: Of weights, gradients, optimizer states, and weights going forward.
    """
    found: dict[tuple[int, ...], Seat] = {}
    for number, rank in enumerate(ground.ranks):
        groups = [part.group_of(number) for part in parts]
        sizes = [stop - start for start, stop in groups]
        key = (*sizes, rank.memory_bytes, round(rank.flops))
        found.setdefault(key, Seat(rank, *sizes))
    return tuple(found.values())


def memory_of(
    seats: Iterable[Seat],
    flops: float,
    shape: ModelShape,
    scheme: Scheme,
    settings: PlanSettings,
) -> Memory:
    """Return the memory of the rank that has least to spare, or needs most.

    Args:
        seats: The kinds of ranks under ``scheme``.
        flops: Of all ranks together; each computes tokens in proportion to its own.
        shape: Of the model.
        scheme: Its precisions and micro-steps.
        settings: The budget where a rank has none of its own.
    """
    found = [_memory(seat, flops, shape, scheme, settings) for seat in seats]
    return min(found, key=lambda memory: (_spare(memory), -memory.total))


def _spare(memory: Memory) -> float:
    return memory.budget - memory.total if memory.budget else math.inf


def _memory(
    seat: Seat,
    flops: float,
    shape: ModelShape,
    scheme: Scheme,
    settings: PlanSettings,
) -> Memory:
    rank, held, reduced, stepped, primary = seat
    share = settings.tokens_per_step * rank.flops / flops
    tokens = math.ceil(share / scheme.micro_steps)
    value, block = settings.value_bytes, settings.block
    master = value < MASTER or scheme.optimizer.stops != scheme.weights.stops
    per_state = MOMENTS + MASTER * master
    largest = shape.largest_unit
    weights = _share(shape, held) * value + UNITS * largest * value * (held > 1)
    if primary != held:
        weights += _share(shape, primary) * value
    staging = sum(
        math.ceil(UNITS * largest * wire_bytes(precision, block))
        for precision, degree in (
            (scheme.weight_precision, held),
            (scheme.gradient_precision, reduced),
        )
        if degree > 1
    )
    states = _share(shape, stepped)
    outer = 0
    if not scheme.is_exact:
        sent = math.ceil(states * wire_bytes(scheme.outer_precision, block))
        outer = states * (OUTER + RESIDUAL) + UNITS * sent
    return Memory(
        rank=rank.name,
        budget=rank.memory_bytes or settings.memory_bytes,
        weights=weights,
        gradients=_share(shape, reduced) * value + UNITS * largest * value,
        optimizer=states * per_state,
        outer=outer,
        activations=shape.activation_bytes(tokens, value, kept=not scheme.recompute),
        staging=staging,
        # the buddy's states, and the reduced gradient they are stepped with
        shadow=states * (per_state + 4) * settings.shadow * (stepped > 1),
    )


def _share(shape: ModelShape, degree: int) -> int:
    return -(-shape.numel // degree)
