"""The types of a plan: what is chosen, under which settings, and what it costs."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

import msgspec

from fabric.jobs.plan.partitions import Partition

Precision = Literal["fp32", "bf16", "int8", "int4"]
Dtype = Literal["fp32", "bf16"]
VALUE_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
ORDER: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4")
"""From exact to coarse."""


def wire_bytes(precision: Precision, block: int) -> Fraction:
    """Return the bytes of one value on the wire; codes have an fp32 scale per block.

    A message whose length is no multiple of ``block`` has one scale more.
    """
    if precision in VALUE_BYTES:
        return Fraction(VALUE_BYTES[precision])
    code = Fraction(1) if precision == "int8" else Fraction(1, 2)
    return code + Fraction(4, block)


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan may choose from, and the constants of the model.

    Attributes:
        tokens_per_step: Of the global batch; the same whoever takes part.
        dtype: Of weights, gradients and activations.
        weight_precisions: Allowed for gathers of weights.
        gradient_precisions: Allowed for reductions of gradients.
        outer_precisions: Allowed for pseudo-gradients.
        micro_steps: Allowed numbers of micro-steps per step.
        recompute: Allowed: keep all activations (False), compute them again (True).
        mode: Exact synchronous steps, an outer loop, or whichever "auto" finds better.
        exchange: Of pseudo-gradients: whole copies to everybody, as outer rounds send
            them today, or reduce-scatter and gather.
        inner_steps: H of the outer loop; 0: chosen.
        max_inner_steps: Largest H to choose.
        outer_share: H is the smallest for which exchanges cost at most this part of
            the inner steps.
        outer_gain: "auto" leaves exact steps only for an outer loop this much faster.
        overlap: Part of the transfers that computing hides, of what it could hide.
        codec_bytes_per_second: fp32 bytes a rank quantises or restores per second.
        block: Values per scale.
        memory_bytes: Per rank, where a rank does not say; 0: not limited.
        shadow: Keep each optimizer shard on a buddy too.
        replication_budget: Part of a link that replicas between sites may take.
    """

    tokens_per_step: int = 4096
    dtype: Dtype = "fp32"
    weight_precisions: tuple[Precision, ...] = ("fp32", "int8")
    gradient_precisions: tuple[Precision, ...] = ("fp32", "int8")
    outer_precisions: tuple[Precision, ...] = ("int8",)
    micro_steps: tuple[int, ...] = (1,)
    recompute: tuple[bool, ...] = (False, True)
    mode: Literal["auto", "exact", "outer"] = "auto"
    exchange: Literal["gather", "reduce"] = "gather"
    inner_steps: int = 0
    max_inner_steps: Annotated[int, msgspec.Meta(ge=1)] = 100
    outer_share: float = 0.1
    outer_gain: float = 2.0
    overlap: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    codec_bytes_per_second: float = 2e9
    block: int = 256
    memory_bytes: int = 0
    shadow: bool = True
    replication_budget: float = 0.1

    @property
    def value_bytes(self) -> int:
        """Return the bytes of one value in memory."""
        return VALUE_BYTES[self.dtype]


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """One choice: who holds what together, in which precision it travels.

    Attributes:
        weights: Groups that hold the weights together: d_w.
        gradients: The same for gradients: d_g; no finer.
        optimizer: The same for optimizer states: d_o; no finer.
        sync: Groups that step together; several of them run an outer loop.
        forward: Weights are gathered among these in the forward pass, if not among
            ``weights`` (the primary partition of ZeRO++'s hpZ).
        inner_steps: Steps between two exchanges of an outer loop; 1 without one.
        ring: Flat rings that know of no places, as stock ZeRO-3 has.
        name: Of a known scheme, if it is one.
    """

    weights: Partition
    gradients: Partition
    optimizer: Partition
    sync: Partition
    forward: Partition | None = None
    weight_precision: Precision = "fp32"
    gradient_precision: Precision = "fp32"
    outer_precision: Precision = "int8"
    inner_steps: int = 1
    micro_steps: int = 1
    recompute: bool = False
    ring: bool = False
    name: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether all ranks take every step together."""
        return len(self.sync.stops) == 1

    @property
    def degrees(self) -> str:
        """Return d_w, d_g and d_o: "2|8|384"."""
        parts = (self.weights, self.gradients, self.optimizer)
        return "|".join(part.degree for part in parts)


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the rank for which they are tightest."""

    rank: str = ""
    budget: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    outer: int = 0
    activations: int = 0
    staging: int = 0
    shadow: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Return each part by name."""
        names = ("weights", "gradients", "optimizer", "outer", "activations")
        return {n: getattr(self, n) for n in (*names, "staging", "shadow")}

    @property
    def total(self) -> int:
        """Return all parts together."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the budget holds it; 0 is no limit."""
        return not self.budget or self.total <= self.budget


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of collective costs per step.

    Attributes:
        name: For people: "weights, forward".
        level: At whose links it takes longest.
        seconds: Per step, before anything is hidden.
        level_bytes: Over the links of each level, from level 1 on, per step.
    """

    name: str
    level: int
    seconds: float
    level_bytes: tuple[int, ...]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheme costs per step, exchanges of an outer loop spread over theirs.

    Attributes:
        seconds: In all.
        compute_seconds: Of it, computing.
        transfers: What is moved, hidden or not.
        hidden_seconds: Transfers that computing hides.
        level_bytes: Over the links of each level, from level 1 on.
        outer_seconds: One whole exchange of an outer loop.
    """

    seconds: float
    compute_seconds: float
    transfers: tuple[Transfer, ...]
    hidden_seconds: float
    level_bytes: tuple[int, ...]
    outer_seconds: float = 0.0
