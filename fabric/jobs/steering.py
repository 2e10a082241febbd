"""Which settings of a running job people may change, and what they come to.

The coordinator puts the settings in force into each round's decision, so they are part
of what every participant applies and of what a successor replays: the outer step of
that round takes them, and the inner steps from the next round on.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from typing import Any

import msgspec

from fabric.core.errors import ConfigError
from fabric.jobs.messages import Setting
from fabric.jobs.spec import JobSpec, spec_of

STEERABLE = (
    "train.learning_rate",
    "train.weight_decay",
    "train.grad_clip",
    "train.outer.learning_rate",
    "train.outer.momentum",
)
"""What can change between two rounds without another model, data order or encoding."""


def parse_setting(spec: JobSpec, path: str, text: str) -> float:
    """Return the value of ``path`` that ``text`` names, as the spec's schema has it.

    Raises:
        ConfigError: not steerable, no number, or out of range.
    """
    if path not in STEERABLE or spec.kind != "train":
        near = difflib.get_close_matches(path, STEERABLE, n=1, cutoff=0.3)
        raise ConfigError(
            f"{path} cannot be changed while a {spec.kind} job runs",
            code="E_NOT_STEERABLE",
            next_step=f"did you mean {near[0]}?" if near else ", ".join(STEERABLE),
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ConfigError(f"{path}: {text!r} is not a number")
    _with(spec, path, float(value))
    return float(value)


def _with(spec: JobSpec, path: str, value: float) -> JobSpec:
    tree: dict[str, Any] = msgspec.to_builtins(spec)
    section = tree
    *parents, leaf = path.split(".")
    for part in parents:
        section = section[part]
    section[leaf] = value
    return spec_of(tree, path)


def value_at(spec: JobSpec, path: str) -> float:
    """Return what ``spec`` says at ``path``, which is steerable."""
    value: Any = spec
    for part in path.split("."):
        value = getattr(value, part)
    return float(value)


def steer(spec: JobSpec, settings: Iterable[Setting]) -> JobSpec:
    """Return ``spec`` with ``settings``; what is not allowed is left out, by everybody.

    A coordinator that sends nonsense changes nothing, the same nothing everywhere.
    """
    for setting in settings:
        if setting.path not in STEERABLE or not math.isfinite(setting.value):
            continue
        try:
            spec = _with(spec, setting.path, setting.value)
        except ConfigError:
            continue
    return spec
