"""An optimizer's param groups when each rank knows only the parameters it holds.

A pipeline stage's optimizer has groups of its own parameters. Saved together they are
the groups of the whole model; a stage that loads, however cut, finds each of its groups
inside one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from checkpoints.manifest import Json
from fabric.core.errors import ConfigError

Group = Mapping[str, Json]


def merge_optimizers(told: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Return one optimizer state from those of all ranks: groups and numbers united.

    Groups of equal options become one; the first rank's order counts.
    """
    groups: list[dict[str, Json]] = []
    numbers: dict[str, Json] = {}
    for rank, each in enumerate(told):
        for place, group in enumerate(each.get("param_groups", [])):
            if rank == 0:
                groups.append({**group, "params": list(group.get("params", []))})
            else:
                _join(groups, place, group)
        numbers.update(each.get("state", {}))
    return {"param_groups": groups, "state": numbers}


def _join(groups: list[dict[str, Json]], place: int, group: Group) -> None:
    """Add a group's parameters to an equal group, the one at its place if it can."""
    order = sorted(range(len(groups)), key=lambda k: k != place)
    for number in order:
        if _options(groups[number]) == _options(group):
            known = groups[number]["params"]
            present = set(known)
            known += [name for name in group.get("params", []) if name not in present]
            return
    groups.append({**group, "params": list(group.get("params", []))})


def match_groups(
    mine: Iterable[Group], saved: Sequence[Group]
) -> list[dict[str, Json]]:
    """Return the saved options for each of our groups.

    Raises:
        ConfigError: a group's parameters are not all in one saved group.
    """
    found = []
    for group in mine:
        names = set(group.get("params", []))
        fits = [each for each in saved if names <= set(each.get("params", []))]
        if not fits:
            raise ConfigError(
                f"no saved param group holds {sorted(names)[:3]} ...",
                code="E_OPTIMIZER",
                next_step="build the optimizer with the groups that were saved",
            )
        found.append(_options(fits[0]))
    return found


def _options(group: Group) -> dict[str, Json]:
    return {key: value for key, value in group.items() if key != "params"}
