"""What a step of the native engine sends and what its states weigh, in closed form.

Let the model have N elements, k micro-steps, and let E(n) be the bytes of n elements on
the wire: 4 n in fp32, 2 n in bf16, and n + 4 ceil(n / B) in int8, ceil(n / 2) + 4
ceil(n / B) in int4 with blocks of B. W is N with each tensor's rows made up to a
multiple of d_w (FSDP2 sends the padding). Bytes sent by all ranks of one ... per step:

========= ================================ =========================================
island    weights, forward and backward    2 k (d_w - 1) E_w(W)       ``gather_w``
island    gradients to shards of 1 / d_w   k (d_w - 1) E_r(W)         ``reduce_w``
group     gradients to shards of 1 / d_g   k (d_g / d_w - 1) E_g(N)   ``reduce_g``
domain    gradients to shards of 1 / d_o   (d_o / d_g - 1) E_o(N)     ``reduce_o``
world     gradients summed over domains    (R / d_o - 1) E_o(N)       ``reduce_x``
world     and brought back                 (R / d_o - 1) E_o(N)       ``gather_x``
domain    updated weights to the groups    (d_o / d_g - 1) E_u(N)     ``gather_o``
group     and to the islands               (d_g / d_w - 1) E_u(N)     ``gather_g``
========= ================================ =========================================

with R ranks in all, and n of E(n) one message: its elements of one unit (FSDP2 module)
for one peer. Each rank of equal islands sends an equal share. Where sizes do not
divide, d_o / d_g is the number of groups in that domain, and so on; the sums hold
exactly, and :func:`traffic` gives each pair of ranks. Gathering forwards what was
encoded once, so ``gather_o`` and ``gather_g`` carry the same bytes for an element.

A rank holds 2 or 4 N / d_w bytes of weights, 4 N / d_g of gradients, 12 N / d_o of
optimizer states, and, with error feedback, 4 bytes for each element that it sends
quantised: 4 (N / d_w - N / d_g) and 4 (N / d_g - N / d_o).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

import msgspec

from training.sharding import (
    DOMAIN,
    GROUP,
    ISLAND,
    WORLD,
    Geometry,
    Ranks,
    numel,
)
from training.sharding_moves import (
    GRADIENT_LEVELS,
    WEIGHT_LEVELS,
    gathering,
    reduction,
)

Form = Literal["fp32", "bf16", "int8", "int4"]
BLOCK = 256
"""Elements with one scale."""


def encoded_bytes(count: int, form: Form, block: int = BLOCK) -> int:
    """Return the bytes of ``count`` elements on the wire."""
    match form:
        case "fp32":
            return 4 * count
        case "bf16":
            return 2 * count
        case "int8":
            return count + 4 * -(-count // block)
        case "int4":
            return -(-count // 2) + 4 * -(-count // block)


class Wires(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How elements travel at each level. Quantised forms lose something; others do not.

    Attributes:
        gather_w: Weights inside an island, before each use (ZeRO++ qwZ). "fp32" and
            "bf16" stand for the weights' own type.
        reduce_w: Gradients inside an island (qgZ).
        reduce_g: Gradients between islands, at each micro-step.
        reduce_o: Gradients between groups and between domains, once per step.
        update: Updated weights, from the optimizer's owners outwards; quantised, it is
            the change that travels, and what was lost is made up for at the next step.
        block: Elements with one scale.
        error_feedback: Add what quantising a gradient dropped to the next one; inside
            an island nothing is kept: that would take a whole model in fp32.
    """

    gather_w: Form = "fp32"
    reduce_w: Form = "fp32"
    reduce_g: Form = "fp32"
    reduce_o: Form = "fp32"
    update: Form = "fp32"
    block: int = BLOCK
    error_feedback: bool = True


class Memory(NamedTuple):
    """Bytes that a rank holds between steps, by kind."""

    weights: int
    gradients: int
    states: int
    residuals: int


class Flow(NamedTuple):
    """What is counted together: the operation, and the two ranks."""

    operation: str
    source: int
    target: int


Unit = range
"""Tensors that are gathered and reduced together: they follow each other."""


def traffic(
    geometry: Geometry,
    units: Sequence[Unit],
    wires: Wires,
    *,
    micro_steps: int = 1,
    reshard: bool | int = True,
    frozen: Sequence[Sequence[tuple[int, ...]]] = (),
) -> Counter[Flow]:
    """Return the bytes that each rank sends to each other in one step.

    Args:
        geometry: The cuts.
        units: Of all tensors.
        wires: How they travel.
        micro_steps: k.
        reshard: True; False = weights stay after the forward pass and are gathered
            once; h = they stay cut over runs of h ranks (hpZ of ZeRO++), and the
            second gather is among those: (h - 1) / h of the padded weights.
        frozen: Of each unit, the shapes that are gathered but not trained.
    """
    found: Counter[Flow] = Counter()
    for number, unit in enumerate(units):
        still = frozen[number] if frozen else ()
        for island in geometry.nesting.islands:
            shard = padded_shard([geometry.shapes[t] for t in unit], len(island))
            gathered = shard + padded_shard(still, len(island))
            for part in _weight_gathers(island, reshard):
                count = gathered * len(island) // len(part)
                size = encoded_bytes(count, wires.gather_w, wires.block)
                _to_each(found, "gather_w", part, micro_steps * size)
            size = encoded_bytes(shard, wires.reduce_w, wires.block)
            _to_each(found, "reduce_w", island, micro_steps * size)
        for rank in geometry.nesting.world:
            _reduced(found, geometry, unit, wires, micro_steps, rank)
            _gathered(found, geometry, unit, wires, rank)
    return found


def _weight_gathers(island: Ranks, reshard: bool | int) -> list[Ranks]:
    """Return among whom an island's weights are gathered in one micro-step."""
    if isinstance(reshard, bool):
        return [island] * (2 if reshard else 1)
    ranks = sorted(island)
    runs = range(0, len(ranks), reshard)
    return [island, *(tuple(ranks[at : at + reshard]) for at in runs)]


def _to_each(
    found: Counter[Flow], operation: str, island: Sequence[int], size: int
) -> None:
    for source, target in permutations(island, 2):
        found[Flow(operation, source, target)] += size


def padded_shard(shapes: Iterable[tuple[int, ...]], parts: int) -> int:
    """Return the elements that FSDP2 sends for one rank's shard of some tensors."""
    return sum(-(-rows // parts) * prod(inner) for rows, *inner in shapes)


def _reduced(
    found: Counter[Flow],
    geometry: Geometry,
    unit: Unit,
    wires: Wires,
    micro_steps: int,
    rank: int,
) -> None:
    for level, operation, form, times in (
        (GROUP, "reduce_g", wires.reduce_g, micro_steps),
        (DOMAIN, "reduce_o", wires.reduce_o, 1),
        (WORLD, "reduce_x", wires.reduce_o, 1),
    ):
        moves = reduction(geometry, level, rank, unit)
        for peer, cut in moves.sends.items():
            size = encoded_bytes(numel(cut), form, wires.block)
            found[Flow(operation, rank, peer)] += times * size


def _gathered(
    found: Counter[Flow], geometry: Geometry, unit: Unit, wires: Wires, rank: int
) -> None:
    for levels, operations, form in (
        (WEIGHT_LEVELS, ("gather_o", "gather_g"), wires.update),
        (GRADIENT_LEVELS, ("gather_x",), wires.reduce_o),
    ):
        plan = gathering(geometry, levels, rank, unit)
        for operation, hop in zip(operations, plan.hops, strict=True):
            for peer, numbers in hop.sends.items():
                for n in numbers:
                    size = encoded_bytes(plan.atoms[n].numel, form, wires.block)
                    found[Flow(operation, rank, peer)] += size


def memory(geometry: Geometry, wires: Wires, rank: int, *, weight_bytes: int) -> Memory:
    """Return what a rank holds between steps; FSDP2's padding included.

    Args:
        geometry: The cuts.
        wires: Quantised gradients keep a residual.
        rank: Whose.
        weight_bytes: Bytes of one weight: 4, or 2 in bf16.
    """
    island = len(geometry.nesting.part(ISLAND, rank))
    kept = 0
    for level, form in (
        (GROUP, wires.reduce_g),
        (DOMAIN, wires.reduce_o),
        (WORLD, wires.reduce_o),
    ):
        if wires.error_feedback and form in ("int8", "int4"):
            kept += geometry.held(level - 1, rank) - geometry.held(level, rank)
            if level == WORLD and len(geometry.nesting.domains) > 1:
                kept += geometry.held(WORLD, rank)
    return Memory(
        weight_bytes * padded_shard(geometry.shapes, island),
        4 * geometry.held(GROUP, rank),
        12 * geometry.held(DOMAIN, rank),
        4 * kept,
    )
