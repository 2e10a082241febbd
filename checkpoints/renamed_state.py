"""Follow a name map in what is no tensor: the parameters of an optimizer's groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from checkpoints.formats.source import MODEL
from checkpoints.manifest import Json
from checkpoints.mapping import Mapped


def rename_parameters(state: Mapping[str, Json], mapped: Mapped) -> dict[str, Json]:
    """Return ``state`` with the names in every list ``params`` those of the target.

    A parameter that was split is named by all its parts; parts that were merged, once.
    """
    renamed: dict[str, list[str]] = defaultdict(list)
    for target, view in mapped.views.items():
        for name in view.sources:
            if name.startswith(MODEL) and target.startswith(MODEL):
                renamed[name.removeprefix(MODEL)].append(target.removeprefix(MODEL))
    return {key: _renamed(value, renamed) for key, value in state.items()}


def _renamed(value: Json, renamed: Mapping[str, list[str]]) -> Json:
    if isinstance(value, dict):
        return {
            key: _names(each, renamed)
            if key == "params" and isinstance(each, list)
            else _renamed(each, renamed)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_renamed(each, renamed) for each in value]
    return value


def _names(names: list[Json], renamed: Mapping[str, list[str]]) -> list[Json]:
    found = (
        renamed.get(name, [name]) if isinstance(name, str) else [name] for name in names
    )
    return list(dict.fromkeys(each for several in found for each in several))
