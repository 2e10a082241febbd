"""Why a scheme was chosen, and what each other one lost by, in a sentence."""

from __future__ import annotations

import msgspec

from fabric.jobs.plan.ground import Ground
from fabric.jobs.plan.planner import EQUAL, EQUAL_OUTER, Option, Plan
from fabric.jobs.plan.quantities import seconds_text, size_text
from fabric.jobs.plan.schemes import Cost, PlanSettings, Transfer


def with_reasons(plan: Plan, ground: Ground, settings: PlanSettings) -> Plan:
    """Return ``plan`` with a reason for each option."""
    options = tuple(
        msgspec.structs.replace(
            option,
            chosen=option is plan.best,
            why=why(option, plan.best, ground, settings),
        )
        for option in plan.options
    )
    best = next((option for option in options if option.chosen), None)
    return msgspec.structs.replace(plan, best=best, options=options)


def why(
    option: Option, best: Option | None, ground: Ground, settings: PlanSettings
) -> str:
    """Return why ``option`` was chosen or not."""
    if not option.fits:
        return _too_large(option)
    if best is None:
        return "not one of those to choose from"
    if option is best:
        return _chosen(option, ground)
    if _same(option, best):
        return "this is what was chosen"
    slower = option.cost.seconds / best.cost.seconds
    if slower > EQUAL:
        return f"{slower:.2f}x slower: {_dearer(option.cost, best.cost, ground)}"
    if best.scheme.is_exact and not option.scheme.is_exact:
        return (
            f"{1 / slower:.2f}x faster, but an outer loop is another algorithm: "
            f"taken from {settings.outer_gain:g}x on"
        )
    if slower < 1 / EQUAL:
        islands, fewer = len(option.scheme.sync.stops), len(best.scheme.sync.stops)
        return (
            f"{1 / slower:.2f}x faster, but in {islands} islands, not {fewer}: "
            f"farther from synchronous; taken from {EQUAL_OUTER:g}x on"
        )
    more = option.memory.total - best.memory.total
    if more > 0:
        return f"as fast, with {size_text(more)} more memory"
    return "as fast, but coarser"


def _same(option: Option, best: Option) -> bool:
    one, other = option.scheme, best.scheme
    return not one.ring and msgspec.structs.replace(one, name="") == other


def _too_large(option: Option) -> str:
    memory = option.memory
    name, size = max(memory.parts.items(), key=lambda part: part[1])
    return (
        f"needs {size_text(memory.total)}, {memory.rank} has "
        f"{size_text(memory.budget)}; {size_text(size)} are {name}"
    )


def _chosen(option: Option, ground: Ground) -> str:
    cost = option.cost
    busy = cost.compute_seconds / cost.seconds
    text = f"the fastest that fits: computing is {busy:.0%} of the step"
    if cost.transfers:
        most = max(cost.transfers, key=lambda each: each.seconds)
        text += f", then {_transfer(most, ground)}"
    return text


def _dearer(cost: Cost, best: Cost, ground: Ground) -> str:
    known = {each.name: each.seconds for each in best.transfers}
    extra = [
        (each.seconds - known.get(each.name, 0.0), number)
        for number, each in enumerate(cost.transfers)
    ]
    more = cost.compute_seconds - best.compute_seconds
    if not extra or more > max(extra)[0]:
        return f"computing {seconds_text(more)} more: activations are computed again"
    return _transfer(cost.transfers[max(extra)[1]], ground)


def _transfer(transfer: Transfer, ground: Ground) -> str:
    where = f" at {level_name(ground, transfer.level)}" if transfer.level >= 0 else ""
    return f"{transfer.name} {seconds_text(transfer.seconds)}{where}"


def level_name(ground: Ground, level: int) -> str:
    """Return the name of the links that leave a place of ``level``."""
    names = ground.levels
    return names[min(level, len(names) - 1)] if names else "this rank"
