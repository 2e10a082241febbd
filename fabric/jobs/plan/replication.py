"""What copies against losses cost, and how much a loss then takes.

Inside a site each optimizer shard has a shadow on another host: it receives the reduced
gradient and takes the same step. Across sites, states are copied within a budget.
"""

from __future__ import annotations

import math

import msgspec

from fabric.jobs.plan.ground import Ground, Place
from fabric.jobs.plan.memory import MASTER, MOMENTS
from fabric.jobs.plan.quantities import seconds_text, size_text
from fabric.jobs.plan.schemes import Cost, PlanSettings, Scheme
from fabric.jobs.plan.shapes import ModelShape

GRADIENT = 4
"""Bytes per parameter of a reduced gradient, as a shadow gets it."""
OUTER = 8
"""Of an outer loop's weights and momentum."""


class Replication(msgspec.Struct, frozen=True, kw_only=True):
    """What is copied, how often, and what a loss costs.

    Attributes:
        what: Who may be lost: "a host of site-a", "a site".
        bytes_each: Sent per step of a shadow, or per copy of a state.
        every_steps: Steps between two copies; 0: nothing is copied.
        loss: What is lost with it, for people.
        covered: Whether anything is there to go on from, in the mesh.
    """

    what: str
    bytes_each: int
    every_steps: int
    loss: str
    covered: bool


def replication_of(
    ground: Ground,
    shape: ModelShape,
    scheme: Scheme,
    cost: Cost,
    settings: PlanSettings,
) -> tuple[Replication, ...]:
    """Return the copies inside sites, then those across them."""
    inside = _inside(ground, shape, scheme, settings)
    across = _across(ground, shape, scheme, cost, settings)
    return (inside, across) if across is not None else (inside,)


def _inside(
    ground: Ground, shape: ModelShape, scheme: Scheme, settings: PlanSettings
) -> Replication:
    sizes = [stop - start for start, stop in scheme.optimizer.groups]
    if len(sizes) > 1 and scheme.is_exact:
        return Replication(
            what="a rank",
            bytes_each=0,
            every_steps=0,
            loss="nothing: every group of ranks holds all states",
            covered=True,
        )
    if max(sizes) == 1:
        loss = "its inner steps of the round: others hold the weights"
        if ground.root.size == 1:
            loss = "all since the last checkpoint: there is one rank"
        return Replication(
            what="a rank",
            bytes_each=0,
            every_steps=0,
            loss=loss,
            covered=ground.root.size > 1,
        )
    if not settings.shadow:
        return Replication(
            what="a rank",
            bytes_each=0,
            every_steps=0,
            loss="all since the last checkpoint: no shadow is kept",
            covered=False,
        )
    hosts = _lone_hosts(ground)
    each = -(-shape.numel // min(sizes)) * GRADIENT
    note = f"; not the loss of {', '.join(hosts[:4])}: no other host there"
    return Replication(
        what="a rank",
        bytes_each=each,
        every_steps=1,
        loss="at most one step" + (note if hosts else ""),
        covered=not hosts,
    )


def _lone_hosts(ground: Ground) -> list[str]:
    """Return the hosts that have no other host in their site."""
    if ground.levels[:1] != ("host",):
        return []
    found = []
    for place in ground.root.walk():
        name = ground.levels[place.level - 1] if place.level else ""
        hosts = [child for child in place.children if child.level == 1]
        if name == "internet":
            found += [child.name for child in hosts]
    if ground.root.level == 1:
        found.append(ground.root.name)
    return found


def _across(
    ground: Ground,
    shape: ModelShape,
    scheme: Scheme,
    cost: Cost,
    settings: PlanSettings,
) -> Replication | None:
    root = ground.root
    if root.level < 2:
        return None
    if len(scheme.optimizer.stops) >= len(root.children):
        lost = "nothing: each site holds all states"
        if not scheme.is_exact:
            lost = f"at most one round of {scheme.inner_steps} steps there"
        return Replication(
            what="a site", bytes_each=0, every_steps=0, loss=lost, covered=True
        )
    worst = max(root.children, key=lambda place: _copy_seconds(place, root, shape))
    size = math.ceil(_state_bytes(worst, root, shape))
    seconds = size / worst.up / settings.replication_budget
    steps = max(1, math.ceil(seconds / cost.seconds))
    return Replication(
        what="a site",
        bytes_each=size,
        every_steps=steps,
        loss=f"at most {steps} steps, {seconds_text(steps * cost.seconds)}: "
        f"{size_text(size)} take that long at "
        f"{settings.replication_budget:.0%} of the link of {worst.name}",
        covered=True,
    )


def _state_bytes(place: Place, root: Place, shape: ModelShape) -> float:
    return shape.numel * (MOMENTS + MASTER) * place.size / root.size


def _copy_seconds(place: Place, root: Place, shape: ModelShape) -> float:
    return _state_bytes(place, root, shape) / place.up
