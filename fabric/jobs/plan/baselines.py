"""Schemes that others run, in the words of the cost model, to compare with."""

from __future__ import annotations

import msgspec

from fabric.jobs.plan.ground import Ground
from fabric.jobs.plan.partitions import Partition
from fabric.jobs.plan.schemes import PlanSettings, Precision, Scheme
from fabric.jobs.plan.times import Flows


def at_level(ground: Ground, level: int) -> Partition:
    """Return the partition into whole places of ``level``."""
    stops = tuple(place.stop for place in ground.root.at(level))
    return Partition(stops, ground.levels[level - 1] if level else "rank")


def flat(flows: Flows, settings: PlanSettings) -> Scheme:
    """Return ZeRO-3: everything over all ranks, in flat rings.

    Source: Rajbhandari et al. 2020, arXiv:1910.02054.
    """
    return _scheme("ZeRO-3, flat", flows, settings, *[flows.whole] * 3, ring=True)


def zero_plus_plus(
    flows: Flows,
    settings: PlanSettings,
    level: int,
    gradient_precision: Precision = "int4",
) -> Scheme:
    """Return ZeRO++: weights in int8, kept within a host for the backward pass.

    Source: Wang et al. 2023, arXiv:2306.10209 (qwZ, hpZ, qgZ).

    Args:
        flows: Of the ground.
        settings: Of the plan.
        level: Of the places with a secondary partition.
        gradient_precision: "int4" is qgZ; with ``settings.dtype`` it is off.
    """
    return Scheme(
        weights=at_level(flows.ground, level),
        gradients=flows.whole,
        optimizer=flows.whole,
        sync=flows.whole,
        forward=flows.whole,
        weight_precision="int8",
        gradient_precision=gradient_precision,
        micro_steps=min(settings.micro_steps),
        recompute=settings.recompute[0],
        name="ZeRO++",
    )


def two_level(flows: Flows, settings: PlanSettings) -> Scheme:
    """Return everything sharded within the places below the top, replicated above.

    MiCS (Zhang et al. 2022, arXiv:2205.00119) and hybrid sharded data parallelism.
    """
    ground = flows.ground
    site = at_level(ground, max(0, ground.root.level - 1))
    return _scheme("2-level", flows, settings, site, site, site)


def three_level(flows: Flows, settings: PlanSettings) -> Scheme:
    """Return weights within level 1, gradients within level 2, optimizer over all.

    Source: Xu et al. 2025, arXiv:2501.04266.
    """
    ground = flows.ground
    one, two = (at_level(ground, min(level, ground.root.level)) for level in (1, 2))
    return _scheme("3-level", flows, settings, one, two, flows.whole)


def as_written(
    flows: Flows, settings: PlanSettings, inner_steps: int, precision: Precision
) -> Scheme:
    """Return what the outer-loop engine of today does: a whole model on each rank."""
    single = flows.single
    scheme = _scheme("as the job says", flows, settings, single, single, single)
    if flows.ground.root.size == 1:
        return scheme
    return msgspec.structs.replace(
        scheme, sync=single, outer_precision=precision, inner_steps=inner_steps
    )


def _scheme(
    name: str,
    flows: Flows,
    settings: PlanSettings,
    weights: Partition,
    gradients: Partition,
    optimizer: Partition,
    *,
    ring: bool = False,
) -> Scheme:
    return Scheme(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        sync=flows.whole,
        weight_precision=settings.dtype,
        gradient_precision=settings.dtype,
        micro_steps=min(settings.micro_steps),
        recompute=settings.recompute[0],
        ring=ring,
        name=name,
    )
