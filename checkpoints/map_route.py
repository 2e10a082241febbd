"""Find the name maps that lead from the form a checkpoint has to the one wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from checkpoints.formats.source import Source
from checkpoints.manifest import Json
from checkpoints.name_maps import NameMap, maps_between
from fabric.core.errors import ConfigError

HUGGINGFACE = "huggingface"
"""The form in which transformers stores a model: the hub of all maps."""


def route(source: Source, names: Sequence[str], config: Json, form: str) -> list[str]:
    """Return the maps that lead from the form of ``names`` to ``form``.

    Args:
        source: For messages.
        names: Names of parameters, without sections.
        config: The model's config.json; its model_type says which maps there are.
        form: "huggingface", or another that a map of the family has.

    Raises:
        ConfigError: no such form, or no way to it.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        if form == HUGGINGFACE:
            return []
        raise ConfigError(
            f"{source.path}: no config says which model this is",
            code="E_MODEL_CONFIG",
            next_step="name its config.json with --config, or the map with --map",
        )
    graph = maps_between(model_type)
    found = _forms(graph, names) - {HUGGINGFACE}
    if found == {form}:
        return []
    way: list[str] = []
    for each in sorted(found):
        way += _path(graph, each, HUGGINGFACE, model_type)
    if form != HUGGINGFACE:
        way += _path(graph, HUGGINGFACE, form, model_type)
    return list(dict.fromkeys(way))


def _forms(graph: Mapping[str, NameMap], names: Sequence[str]) -> set[str]:
    """Return the forms of ``names``: those that no map which has them contradicts.

    Two forms share names; one map may see its form where another sees none of its own.
    """
    seen = {name: each.form_of(names) for name, each in graph.items()}
    return {
        form
        for form in seen.values()
        if form
        and all(
            seen[name] in {"", form}
            for name, each in graph.items()
            if form in {each.parts_form, each.whole_form}
        )
    }


def _path(
    graph: Mapping[str, NameMap], begin: str, end: str, model_type: str
) -> list[str]:
    """Return the fewest maps from one form to another."""
    ways: dict[str, list[str]] = {begin: []}
    todo = [begin]
    while todo and end not in ways:
        form = todo.pop(0)
        for name, each in sorted(graph.items()):
            sides = {each.parts_form, each.whole_form}
            if form in sides:
                (other,) = sides - {form}
                if other not in ways:
                    ways[other] = [*ways[form], name]
                    todo.append(other)
    if end not in ways:
        forms = {
            f for each in graph.values() for f in (each.parts_form, each.whole_form)
        }
        raise ConfigError(
            f"no map leads from {begin!r} to {end!r} for {model_type!r}",
            code="E_MAP",
            next_step=f"forms known: {', '.join(sorted(forms)) or 'none'}",
        )
    return ways[end]
