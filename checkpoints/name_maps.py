"""Name maps: two forms of a model family and how one is made from the other.

The maps are data files in checkpoints/maps (its docstring has the grammar); this module
reads them and finds the one that is meant.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec

from checkpoints.formats.source import Ignored
from fabric.core.errors import ConfigError

MAX_MAP_BYTES = 1 << 20
_PLACEHOLDERS = {
    "L": r"(?P<L>0|[1-9][0-9]{0,5})",
    "E": r"(?P<E>0|[1-9][0-9]{0,5})",
    "W": r"(?P<W>weight|bias)",
}
STACKABLE = ("L", "E")
"""Placeholders that can be an axis, outermost first."""

Values = tuple[tuple[str, str], ...]
"""Placeholder and value, sorted: what makes one binding of a rule."""


class Pattern:
    """A name with placeholders."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.holes = frozenset(re.findall(r"\{(\w)\}", text))
        escaped = re.escape(text).replace(r"\{", "{").replace(r"\}", "}")
        self._regex = re.compile(
            re.sub(r"\{(\w)\}", lambda hole: _PLACEHOLDERS[hole.group(1)], escaped)
        )

    def match(self, name: str) -> dict[str, str] | None:
        """Return the values with which this is ``name``, or None."""
        found = self._regex.fullmatch(name)
        return found.groupdict() if found else None

    def fits(self, name: str) -> bool:
        """Return whether some values make this ``name``."""
        return self._regex.fullmatch(name) is not None

    def name(self, values: Mapping[str, str]) -> str:
        """Return the name with these values."""
        return re.sub(r"\{(\w)\}", lambda hole: values[hole.group(1)], self.text)


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How some tensors of one form are one of the other; see checkpoints/maps."""

    parts: Annotated[list[str], msgspec.Meta(min_length=1)]
    whole: list[str] | str
    rows: list[str] = []
    groups: str = "1"
    turned: bool = False
    crop: str = ""

    def part_patterns(self) -> list[Pattern]:
        """Return the patterns of the parts, in order."""
        return _patterns(tuple(self.parts))

    def whole_patterns(self) -> list[Pattern]:
        """Return the patterns of the whole; the first is the one written."""
        names = (self.whole,) if isinstance(self.whole, str) else tuple(self.whole)
        return _patterns(names)


class IgnoreRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names (shell patterns) without a counterpart, and why."""

    names: list[str]
    reason: str


class NameMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file; see checkpoints/maps."""

    title: str
    model_types: list[str]
    parts_form: str
    whole_form: str
    rules: list[Rule]
    numbers: dict[str, str] = {}
    complete: bool = False
    ignore: list[IgnoreRule] = []

    def ignored(self, name: str) -> Ignored | None:
        """Return why a tensor is left out, or None if it is not."""
        for each in self.ignore:
            if any(fnmatchcase(name, pattern) for pattern in each.names):
                return Ignored(name, each.reason)
        return None

    def form_of(self, names: Iterable[str]) -> str:
        """Return the form whose names these are (without sections), or "".

        Raises:
            ConfigError: they are of both.
        """
        parts, wholes = set(), set()
        rules = [(r.part_patterns(), r.whole_patterns()) for r in self.rules]
        for name in names:
            in_parts = any(p.fits(name) for side, _ in rules for p in side)
            in_whole = any(p.fits(name) for _, side in rules for p in side)
            if in_parts and not in_whole:
                parts.add(name)
            elif in_whole and not in_parts:
                wholes.add(name)
        if parts and wholes:
            raise ConfigError(
                f"names of both forms: {min(parts)!r} is {self.parts_form}, "
                f"{min(wholes)!r} is {self.whole_form}",
                code="E_MAP_MIXED",
                next_step="the checkpoint mixes two layouts: use another map",
            )
        return self.parts_form if parts else self.whole_form if wholes else ""


@cache
def _patterns(names: tuple[str, ...]) -> list[Pattern]:
    return [Pattern(name) for name in names]


def map_names() -> list[str]:
    """Return the names of the maps that come with this program."""
    found = files("checkpoints.maps").iterdir()
    return sorted(
        each.name.removesuffix(".toml") for each in found if each.name.endswith(".toml")
    )


def load_map(name: str) -> NameMap:
    """Return a map by its name, or from a .toml file of your own.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    if name.endswith(".toml"):
        return _parse(_read(Path(name)), name)
    if name not in map_names():
        raise ConfigError(
            f"no name map {name!r}",
            code="E_MAP",
            next_step=f"known: {', '.join(map_names())}; or name a .toml file",
        )
    return _known(name)


def maps_between(model_type: str) -> dict[str, NameMap]:
    """Return the maps of a model type, by name."""
    known = {name: _known(name) for name in map_names()}
    return {
        name: each for name, each in known.items() if model_type in each.model_types
    }


@cache
def _known(name: str) -> NameMap:
    text = (files("checkpoints.maps") / f"{name}.toml").read_text()
    return _parse(text, name)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MAP_BYTES).decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"{path}: {exc}", code="E_MAP", next_step="check the path of --map"
        ) from exc


def _parse(text: str, name: str) -> NameMap:
    """Return the map of a file.

    Raises:
        ConfigError: it is malformed.
    """
    try:
        parsed = msgspec.convert(tomllib.loads(text), NameMap)
        for rule in parsed.rules:
            _check_rule(rule)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, KeyError) as exc:
        raise ConfigError(
            f"name map {name}: {exc}",
            code="E_MAP",
            next_step="those in checkpoints/maps are examples; their package's "
            "docstring has the grammar",
        ) from exc
    return parsed


def _check_rule(rule: Rule) -> None:
    sides = [p.holes for p in rule.part_patterns()]
    if rule.rows and len(rule.rows) != len(rule.parts):
        raise KeyError(f"{rule.parts[0]}: as many rows as parts")
    if any(side != sides[0] for side in sides) or any(
        not p.holes <= sides[0] for p in rule.whole_patterns()
    ):
        raise KeyError(f"{rule.parts[0]}: placeholders differ")
