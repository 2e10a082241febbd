"""The tensors that a model of transformers has, from its config.json.

from_pretrained gives a tensor that a file lacks random values and goes on; so what is
written for it is compared with this list first.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

import msgspec

from checkpoints.manifest import Json
from checkpoints.model_numbers import ModelNumbers
from fabric.core.errors import ConfigError

MAX_LAYERS = 10_000
MAX_EXPERTS = 10_000
MAX_TENSORS = 1_000_000

Shape = tuple[int, ...]


class Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file of checkpoints/families; see there.

    Attributes:
        model_types: Values of config.json's model_type.
        layers: Formula of how many there are.
        architectures: model_type -> the class that loads it.
        tensors: Name -> shape, with placeholders.
        numbers: Field -> formula where a config lacks it.
        flags_of: model_type -> conditions that hold, or the field that says so.
        tied: Name -> name of what it is if ``tie_word_embeddings``.
        experts: Formula of how many there are, or empty.
        sparse_step: Formula: every so many layers have experts; empty: all have.
        dense_layers: Field with numbers of layers that have none.
    """

    model_types: list[str]
    layers: str
    architectures: dict[str, str]
    tensors: dict[str, str]
    numbers: dict[str, str] = {}
    flags_of: dict[str, dict[str, bool | str]] = {}
    tied: dict[str, str] = {}
    experts: str = ""
    sparse_step: str = ""
    dense_layers: str = ""


@cache
def families() -> Mapping[str, Family]:
    """Return what is known, by model_type."""
    known: dict[str, Family] = {}
    for each in files("checkpoints.families").iterdir():
        if each.name.endswith(".toml"):
            family = msgspec.convert(tomllib.loads(each.read_text()), Family)
            known.update(dict.fromkeys(family.model_types, family))
    return known


def family_of(config: Mapping[str, Json]) -> Family | None:
    """Return the family of a config, or None if its tensors are not known here."""
    model_type = config.get("model_type")
    return families().get(model_type) if isinstance(model_type, str) else None


def ties_embeddings(config: Mapping[str, Json]) -> bool:
    """Return whether the config says that the head is the embedding."""
    family = family_of(config)
    numbers = ModelNumbers(config, family.numbers if family else {})
    return numbers.flag("tie_word_embeddings")


def expected_tensors(config: Mapping[str, Json]) -> dict[str, Shape]:
    """Return name -> shape of every tensor, tied ones included.

    Raises:
        ConfigError: the family is not known, a field is missing or out of range.
    """
    family = family_of(config)
    if family is None:
        raise ConfigError(
            f"the tensors of model_type {config.get('model_type')!r} are not known",
            code="E_MODEL_CONFIG",
        )
    return dict(_Listing(family, config).tensors())


class _Listing:
    """The tensors of one config."""

    def __init__(self, family: Family, config: Mapping[str, Json]) -> None:
        self._family = family
        self._config = config
        self._numbers = ModelNumbers(config, family.numbers)
        self._layers = self._count(family.layers, MAX_LAYERS)
        self._experts = self._count(family.experts, MAX_EXPERTS)
        if self._layers * max(self._experts, 1) > MAX_TENSORS:
            raise ConfigError("more tensors than any model has", code="E_MODEL_CONFIG")

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield name and shape of each."""
        for pattern, text in self._family.tensors.items():
            extents, _, condition = text.partition(" if ")
            shape = None
            for layer in range(self._layers if "{L}" in pattern else 1):
                if condition and not self._holds(condition, layer):
                    continue
                if shape is None:
                    shape = tuple(map(self._numbers.value, extents.split(",")))
                for expert in range(self._experts if "{E}" in pattern else 1):
                    name = pattern.replace("{L}", str(layer))
                    yield name.replace("{E}", str(expert)), shape

    def _count(self, formula: str, limit: int) -> int:
        count = self._numbers.value(formula) if formula else 0
        if count > limit:
            raise ConfigError(f"{formula} is {count} > {limit}", code="E_MODEL_CONFIG")
        return count

    def _holds(self, condition: str, layer: int) -> bool:
        return all(self._flag(name, layer) for name in condition.split(" and "))

    def _flag(self, name: str, layer: int) -> bool:
        if name in {"sparse", "dense"}:
            return self._is_sparse(layer) == (name == "sparse")
        model_type = str(self._config.get("model_type"))
        known = self._family.flags_of.get(model_type, {}).get(name, False)
        return self._numbers.flag(known) if isinstance(known, str) else known

    def _is_sparse(self, layer: int) -> bool:
        family = self._family
        if layer in self._numbers.list_of(family.dense_layers):
            return False
        step = self._numbers.value(family.sparse_step) if family.sparse_step else 1
        return self._experts > 0 and step > 0 and (layer + 1) % step == 0
