"""Time and bytes of a step under a scheme: alpha-beta, with overlap.

A transfer takes as long as at its slowest boundary, and half a round trip for each
level and unit. Computing hides what it can of it, but not the first unit's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from fabric.jobs.plan.flows import Flow, gather, ring, scatter, spread
from fabric.jobs.plan.ground import Ground
from fabric.jobs.plan.memory import Seat, seats_of
from fabric.jobs.plan.partitions import Partition
from fabric.jobs.plan.schemes import (
    VALUE_BYTES,
    Cost,
    PlanSettings,
    Precision,
    Scheme,
    Transfer,
    wire_bytes,
)
from fabric.jobs.plan.shapes import ModelShape

H_LADDER = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500)
"""Inner steps to choose from; DiLoCo's authors go to 500 (arXiv:2311.08105)."""


class Move(NamedTuple):
    """A flow that occurs ``times`` per step.

    Attributes:
        forward: In the forward pass, not the backward.
        every: In each micro-step, not only in the first forward or last backward pass.
        units: Whether it is made of one message per unit of the model.
    """

    name: str
    flow: Flow
    precision: Precision
    times: float
    forward: bool = False
    every: bool = False
    units: bool = True


class Flows:
    """The flows of one ground, each computed once."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.flops = ground.flops
        size = ground.root.size
        self.single = Partition(tuple(range(1, size + 1)), "rank")
        self.whole = Partition((size,), "all")
        self._known: dict[tuple[str, int, int], Flow] = {}
        self._numbers: dict[tuple[int, ...], int] = {}
        self._seats: dict[tuple[int, ...], tuple[Seat, ...]] = {}

    def gather(self, held: Partition, needed: Partition | None = None) -> Flow:
        """Return :func:`fabric.jobs.plan.flows.gather`, by default of everything."""
        return self._get("gather", held, needed or self.single)

    def scatter(self, held: Partition, needed: Partition | None = None) -> Flow:
        """Return :func:`fabric.jobs.plan.flows.scatter`, by default of everything."""
        return self._get("scatter", held, needed or self.single)

    def ring(self, held: Partition) -> Flow:
        """Return :func:`fabric.jobs.plan.flows.ring`."""
        return self._get("ring", held, self.single)

    def spread(self, islands: Partition) -> Flow:
        """Return :func:`fabric.jobs.plan.flows.spread`."""
        return self._get("spread", self.whole, islands)

    def _get(self, kind: str, held: Partition, needed: Partition) -> Flow:
        key = (kind, self._number(held), self._number(needed))
        if key not in self._known:
            self._known[key] = self._compute(kind, held, needed)
        return self._known[key]

    def seats(self, scheme: Scheme) -> tuple[Seat, ...]:
        """Return the kinds of ranks there are under ``scheme``."""
        parts = (
            scheme.weights,
            scheme.gradients,
            scheme.optimizer,
            scheme.forward or scheme.weights,
        )
        key = tuple(map(self._number, parts))
        if key not in self._seats:
            self._seats[key] = seats_of(self.ground, parts)
        return self._seats[key]

    def _number(self, part: Partition) -> int:
        return self._numbers.setdefault(part.stops, len(self._numbers))

    def _compute(self, kind: str, held: Partition, needed: Partition) -> Flow:
        if kind == "ring":
            return ring(self.ground, held)
        if kind == "spread":
            return spread(self.ground, needed)
        return (gather if kind == "gather" else scatter)(self.ground, held, needed)


def moves_of(flows: Flows, scheme: Scheme) -> Iterator[Move]:
    """Yield what a step moves inside the groups that step together."""
    quick, coarse = scheme.weight_precision, scheme.gradient_precision
    steps = scheme.micro_steps
    every = flows.ring if scheme.ring else flows.gather
    back = flows.ring if scheme.ring else flows.scatter
    first = scheme.forward or scheme.weights
    yield Move("weights, forward", every(first), quick, steps, True, True)
    yield Move("weights, backward", every(scheme.weights), quick, steps, False, True)
    yield Move("gradients", back(scheme.gradients), coarse, steps, False, True)
    onward = flows.scatter(scheme.optimizer, scheme.gradients)
    yield Move("gradients to the step", onward, coarse, 1)
    for flow in (flows.scatter, flows.gather):
        between = flow(scheme.sync, scheme.optimizer)
        yield Move("gradients of replicas", between, coarse, 1)
    after = flows.gather(scheme.optimizer, first)
    yield Move("weights after the step", after, quick, 1, True)


class Time(NamedTuple):
    """Seconds of a step and its parts, as in :class:`Cost`."""

    seconds: float
    compute: float
    hidden: float
    outer: float


def time_of(
    flows: Flows, shape: ModelShape, scheme: Scheme, settings: PlanSettings
) -> Time:
    """Return how long a step takes."""
    compute = settings.tokens_per_step * shape.flops_per_token / flows.flops
    per_micro = compute / scheme.micro_steps
    backward = 3 if scheme.recompute else 2
    sums = {
        (forward, every): 0.0 for forward in (True, False) for every in (True, False)
    }
    for move in moves_of(flows, scheme):
        sums[move.forward, move.every] += _seconds(move, shape, settings)
    total = hidden = 0.0
    for forward, thirds in ((True, 1), (False, backward)):
        computing = per_micro * thirds / 3
        each, once = sums[forward, True], sums[forward, False]
        for times, transfer in ((scheme.micro_steps - 1, each), (1, each + once)):
            free = _hidden(computing, transfer, shape, settings)
            total += times * (computing + transfer - free)
            hidden += times * free
    outer = 0.0
    if not scheme.is_exact:
        exchange = _exchange(flows, scheme, settings)
        outer = sum(_seconds(move, shape, settings) for move in exchange)
        total += outer / scheme.inner_steps
    return Time(total, compute * (1 + backward) / 3, hidden, outer)


def cost_of(
    flows: Flows, shape: ModelShape, scheme: Scheme, settings: PlanSettings
) -> Cost:
    """Return what a step costs, in seconds and in bytes of each level."""
    time = time_of(flows, shape, scheme, settings)
    transfers = tuple(
        _transfer(move, shape, settings)
        for move in _all_moves(flows, scheme, settings)
        if any(move.flow.into)
    )
    return Cost(
        seconds=time.seconds,
        compute_seconds=time.compute,
        transfers=transfers,
        hidden_seconds=time.hidden,
        level_bytes=tuple(
            sum(each.level_bytes[level] for each in transfers)
            for level in range(flows.ground.root.level)
        ),
        outer_seconds=time.outer,
    )


def _all_moves(flows: Flows, scheme: Scheme, settings: PlanSettings) -> Iterator[Move]:
    yield from moves_of(flows, scheme)
    if not scheme.is_exact:
        for move in _exchange(flows, scheme, settings):
            yield move._replace(times=1 / scheme.inner_steps)


def inner_steps_of(time: Time, settings: PlanSettings) -> int:
    """Return the fewest inner steps beside which exchanges cost little enough.

    Args:
        time: Of the scheme with one inner step.
        settings: ``inner_steps`` if it is given; else what "little" means.
    """
    if settings.inner_steps:
        return settings.inner_steps
    step = time.seconds - time.outer
    ladder = [steps for steps in H_LADDER if steps <= settings.max_inner_steps]
    for steps in ladder:
        if time.outer <= settings.outer_share * steps * step:
            return steps
    return ladder[-1]


def link_bytes(
    flows: Flows, shape: ModelShape, scheme: Scheme, settings: PlanSettings
) -> list[tuple[str, int, int, int]]:
    """Return (place, level, bytes in, bytes out) per step of every boundary used."""
    moves = list(_all_moves(flows, scheme, settings))
    rows = []
    for index, place in enumerate(flows.ground.root.walk()):
        both = (
            sum(
                _bytes(flow[index], move, shape, settings)
                for move in moves
                if (flow := getattr(move.flow, way))[index]
            )
            for way in ("into", "out")
        )
        taken, given = both
        if taken or given:
            rows.append((place.name, place.level, taken, given))
    return rows


def _exchange(flows: Flows, scheme: Scheme, settings: PlanSettings) -> Iterator[Move]:
    name, precision = "pseudo-gradients", scheme.outer_precision
    if settings.exchange == "gather":
        yield Move(name, flows.spread(scheme.sync), precision, 1, units=False)
        return
    for flow in (flows.scatter, flows.gather):
        between = flow(flows.whole, scheme.sync)
        yield Move(name, between, precision, 1, units=False)


def _seconds(move: Move, shape: ModelShape, settings: PlanSettings) -> float:
    """Return how long one occurrence of ``move`` takes."""
    flow = move.flow
    volume = shape.numel * float(wire_bytes(move.precision, settings.block))
    units = shape.units if move.units else 1
    seconds = volume * flow.slowness + flow.latency * units
    if move.precision not in VALUE_BYTES:
        coded = 4 * shape.numel * float(flow.coded)
        seconds += coded / settings.codec_bytes_per_second
    return seconds


def _hidden(
    computing: float, transfer: float, shape: ModelShape, settings: PlanSettings
) -> float:
    first = transfer / max(1, shape.units)
    return settings.overlap * min(computing, transfer - first)


def _transfer(move: Move, shape: ModelShape, settings: PlanSettings) -> Transfer:
    return Transfer(
        name=move.name,
        level=move.flow.level,
        seconds=_seconds(move, shape, settings) * move.times,
        level_bytes=tuple(
            _bytes(part, move, shape, settings) for part in move.flow.moved
        ),
    )


def _bytes(
    part: Fraction, move: Move, shape: ModelShape, settings: PlanSettings
) -> int:
    each = part * shape.numel * wire_bytes(move.precision, settings.block)
    return math.ceil(each * Fraction(move.times).limit_denominator(10_000))
