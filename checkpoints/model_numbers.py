"""Numbers of a model's config.json, by name or by a short formula.

Data files of this package describe shapes as sums of products of config fields, such as
``num_key_value_heads * head_dim``; a field that a config leaves out may have a formula
of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from checkpoints.manifest import Json
from fabric.core.errors import ConfigError

MAX_NUMBER = 2**31
MAX_DEPTH = 8
"""Of formulas that use formulas: more is a circle."""

_FACTOR = re.compile(r"\s*([*/]?)\s*([A-Za-z_][A-Za-z0-9_]*|[0-9]+)\s*")


class ModelNumbers:
    """The numbers of one config.

    Args:
        config: What config.json holds.
        defaults: Field -> formula, for fields that are missing or null.
    """

    def __init__(self, config: Mapping[str, Json], defaults: Mapping[str, str]) -> None:
        self._config = config
        self._defaults = defaults

    def value(self, formula: str, depth: int = 0) -> int:
        """Return what ``formula`` is for this config.

        Raises:
            ConfigError: a field is missing, no whole number, or out of range.
        """
        total = sum(self._product(term, depth) for term in formula.split("+"))
        if not 0 <= total < MAX_NUMBER:
            raise _bad(f"{formula} is {total}")
        return total

    def flag(self, name: str) -> bool:
        """Return whether a field is true; a missing one may have a default, "1"."""
        value = self._config.get(name)
        if value is None:
            return self._defaults.get(name, "0") != "0"
        return value is True

    def list_of(self, name: str) -> list[int]:
        """Return a field that is a list of numbers; a missing one is empty."""
        value = self._config.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise _bad(f"{name} is no list of numbers")
        return value

    def _product(self, term: str, depth: int) -> int:
        result = 1
        at = 0
        while at < len(term):
            match = _FACTOR.match(term, at)
            if match is None or (at > 0) != bool(match.group(1)):
                raise _bad(f"formula {term!r}")
            number = self._number(match.group(2), depth)
            if match.group(1) != "/":
                result *= number
            elif number == 0 or result % number:
                raise _bad(f"{term.strip()}: {result} is no multiple of {number}")
            else:
                result //= number
            at = match.end()
        return result

    def _number(self, name: str, depth: int) -> int:
        if name.isdigit():
            return int(name)
        value = self._config.get(name)
        if value is None and name in self._defaults and depth < MAX_DEPTH:
            return self.value(self._defaults[name], depth + 1)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(
                f"{name} is missing" if value is None else f"{name} is no number"
            )
        return value


def _bad(reason: str) -> ConfigError:
    return ConfigError(
        f"model_config: {reason}",
        code="E_MODEL_CONFIG",
        next_step="save the model's whole config.json in the state, or name the file "
        "with --config",
    )
