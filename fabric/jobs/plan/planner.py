"""The plan: every legal scheme is priced, the best that fits is chosen.

Sharding farther needs less memory and more bytes; so schemes are compared in families
of equal degrees, each by its best choice of precisions, micro-steps and recomputing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import msgspec

from fabric.jobs.plan.ground import Ground
from fabric.jobs.plan.memory import memory_of
from fabric.jobs.plan.partitions import Partition, partitions
from fabric.jobs.plan.schemes import ORDER, Cost, Memory, PlanSettings, Scheme
from fabric.jobs.plan.shapes import ModelShape
from fabric.jobs.plan.times import Flows, cost_of, inner_steps_of, time_of

EQUAL = 1.03
"""Times that differ by less are equal: then the more exact and smaller one wins."""
EQUAL_OUTER = 1.25
"""The same between outer loops: fewer islands stay closer to synchronous."""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """A scheme with its price.

    Attributes:
        why: Why it was chosen, or what it lost by.
        chosen: Whether it is the plan.
    """

    scheme: Scheme
    memory: Memory
    cost: Cost
    why: str = ""
    chosen: bool = False

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory for it."""
        return self.memory.fits


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        best: The chosen option; None when nothing fits.
        options: The best of each family, the fastest that fit first.
        considered: Schemes priced in all.
    """

    best: Option | None
    options: tuple[Option, ...]
    considered: int


def price(
    flows: Flows, shape: ModelShape, scheme: Scheme, settings: PlanSettings
) -> Option:
    """Return ``scheme`` with its memory and cost; H is chosen where it is 0."""
    scheme, memory, _ = _quick(flows, shape, scheme, settings)
    cost = cost_of(flows, shape, scheme, settings)
    return Option(scheme=scheme, memory=memory, cost=cost)


_Quick = tuple[Scheme, Memory, float]


def _quick(
    flows: Flows, shape: ModelShape, scheme: Scheme, settings: PlanSettings
) -> _Quick:
    """Return ``scheme`` with its H, its memory and its seconds."""
    if not scheme.is_exact and scheme.inner_steps == 0:
        one = msgspec.structs.replace(scheme, inner_steps=1)
        steps = inner_steps_of(time_of(flows, shape, one, settings), settings)
        scheme = msgspec.structs.replace(scheme, inner_steps=steps)
    seats = flows.seats(scheme)
    memory = memory_of(seats, flows.flops, shape, scheme, settings)
    return scheme, memory, time_of(flows, shape, scheme, settings).seconds


def find_plan(ground: Ground, shape: ModelShape, settings: PlanSettings) -> Plan:
    """Return the best scheme and the best of each other family.

    Deterministic: equal arguments give equal plans on every peer.
    """
    flows = Flows(ground)
    options, count = [], 0
    for family in _families(ground, settings):
        option, tried = _best_of_family(flows, shape, settings, family)
        options.append(option)
        count += tried
    best = _choose([option for option in options if option.fits], settings)
    options.sort(key=_row_order)  # stable
    return Plan(best=best, options=tuple(options), considered=count)


def _row_order(option: Option) -> tuple[bool, float]:
    """Order what fits by time, then what does not by memory."""
    fits = option.fits
    return not fits, option.cost.seconds if fits else option.memory.total


def nested(
    parts: Iterable[Partition],
) -> Iterator[tuple[Partition, Partition, Partition]]:
    """Yield (weights, gradients, optimizer): each within the next, in every way."""
    every = tuple(parts)
    for states in every:
        for reduced in every:
            if reduced.is_within(states):
                for held in every:
                    if held.is_within(reduced):
                        yield held, reduced, states


Family = tuple[Partition, Partition, Partition, Partition]


def _families(ground: Ground, settings: PlanSettings) -> Iterator[Family]:
    """Yield (weights, gradients, optimizer, sync) of all that may be chosen."""
    parts = partitions(ground)
    syncs = [each for each in parts if "/" not in each.label]
    for sync in syncs:
        exact = len(sync.stops) == 1
        if settings.mode == ("outer" if exact else "exact") and len(syncs) > 1:
            continue
        inside = [part for part in parts if part.is_within(sync)]
        for triple in nested(inside):
            yield (*triple, sync)


def _best_of_family(
    flows: Flows, shape: ModelShape, settings: PlanSettings, family: Family
) -> tuple[Option, int]:
    held, reduced, states, sync = family
    outer = settings.outer_precisions if len(sync.stops) > 1 else ("fp32",)
    # of what is not moved, the precision does not matter
    single = flows.single.stops
    lone = held.stops == single and states.stops == single
    weights = (settings.dtype,) if lone else settings.weight_precisions
    lone = reduced.stops == single and states.stops == single
    lone = lone and sync.stops == single
    gradients = (settings.dtype,) if lone else settings.gradient_precisions
    choices = product(
        weights, gradients, outer, settings.micro_steps, settings.recompute
    )
    tried = [
        _quick(
            flows,
            shape,
            Scheme(
                weights=held,
                gradients=reduced,
                optimizer=states,
                sync=sync,
                weight_precision=weight,
                gradient_precision=gradient,
                outer_precision=sent,
                inner_steps=0 if len(sync.stops) > 1 else 1,
                micro_steps=steps,
                recompute=again,
            ),
            settings,
        )
        for weight, gradient, sent, steps, again in choices
    ]
    fitting = [each for each in tried if each[1].fits]
    if fitting:
        found = _fastest(fitting)
    else:
        found = min(tried, key=lambda each: (each[1].total, _order(each)))
    cost = cost_of(flows, shape, found[0], settings)
    return Option(scheme=found[0], memory=found[1], cost=cost), len(tried)


def _order(each: _Quick) -> tuple[object, ...]:
    """Order schemes that take equally long: the more exact first, then the smaller."""
    scheme, memory, _ = each
    coarse = sum(
        ORDER.index(precision)
        for precision in (scheme.weight_precision, scheme.gradient_precision)
    )
    return (
        scheme.inner_steps,
        coarse,
        scheme.recompute,
        memory.total,
        scheme.micro_steps,
        scheme.degrees,
    )


def _fastest(tried: list[_Quick]) -> _Quick:
    quickest = min(tried, key=lambda each: each[2])
    if not quickest[0].is_exact:
        near = [each for each in tried if each[2] <= EQUAL_OUTER * quickest[2]]
        fewest = min(len(each[0].sync.stops) for each in near)
        tried = [each for each in near if len(each[0].sync.stops) == fewest]
        quickest = min(tried, key=lambda each: each[2])
    return min((each for each in tried if each[2] <= EQUAL * quickest[2]), key=_order)


def _choose(fitting: list[Option], settings: PlanSettings) -> Option | None:
    if not fitting:
        return None
    exact = [option for option in fitting if option.scheme.is_exact]
    other = _pick(fitting)
    if settings.mode == "auto" and exact:
        best = _pick(exact)
        gain = best.cost.seconds / other.cost.seconds
        return other if gain >= settings.outer_gain else best
    return other


def _pick(options: list[Option]) -> Option:
    by_scheme = {id(option.scheme): option for option in options}
    found = _fastest([(o.scheme, o.memory, o.cost.seconds) for o in options])
    return by_scheme[id(found[0])]
