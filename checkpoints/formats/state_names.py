"""Canonical names for the tensors of a nested state, and back.

What programs agree on is little: a dictionary is the model's, another the optimizer's,
under a few usual names. Paths of the first become ``model/<name>``; of the second
``optimizer/<slot>/<name>``. A state without either is taken to be a model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from checkpoints.formats.sink import Bundle
from checkpoints.formats.source import MODEL, OPTIMIZER, Ignored
from checkpoints.formats.state_leaves import (
    EmptyDict,
    NotJson,
    Path,
    gather,
    to_json,
)
from checkpoints.manifest import MAX_NAME_CHARS, Json
from checkpoints.manifest_checks import check_tensor_name
from fabric.core.errors import ConfigError, IntegrityError

T = TypeVar("T")

MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict", "model_state")
OPTIMIZER_KEYS = ("optimizer", "optim", "optimizer_state_dict", "optimizer_state")
RNG_KEYS = ("rng", "rng_state", "torch_rng_state", "cpu_rng_state", "cuda_rng_state")
WRAPPER_KEYS = ("app", "state", "checkpoint", "train_state")


class NamedState(msgspec.Struct, Generic[T]):
    """A state with canonical names.

    Attributes:
        tensors: By name.
        state: What is no tensor.
        ignored: What is not carried over; also what is carried under a name that says
            less than it should.
    """

    tensors: dict[str, T]
    state: dict[str, Json]
    ignored: list[Ignored]


def name_state(found: Sequence[tuple[Path, object]], kind: type[T]) -> NamedState[T]:
    """Return the leaves of a nested state under canonical names.

    Args:
        found: Path and value of each leaf.
        kind: Which leaves are tensors.

    Raises:
        IntegrityError: two tensors get one name, or one has a name that cannot be.
    """
    roles = _Roles(
        (*path, "") if isinstance(value, EmptyDict) else path for path, value in found
    )
    result: NamedState[T] = NamedState({}, {}, [])
    values: dict[Path, Json] = {}
    for path, value in found:
        if isinstance(value, kind):
            name = roles.name(path)
            _check_name(name, result.tensors)
            result.tensors[name] = value
            continue
        place = roles.state_path(path)
        if place in values:
            raise IntegrityError(
                f"two values are both {'.'.join(map(str, place))[:200]!r}",
                code="E_NAME",
            )
        try:
            values[place] = to_json(value)
        except NotJson as error:
            result.ignored.append(Ignored(".".join(map(str, path)), str(error)))
    for section in (("model",), ("optimizer",)):
        if values.get(section) == {}:
            del values[section]  # it says only that there is one
    result.state = gather(values)
    _name_parameters(result)
    return result


def _check_name(name: str, known: Mapping[str, object]) -> None:
    if name in known:
        raise IntegrityError(
            f"two tensors are both {name[:200]!r}",
            code="E_NAME",
            next_step="rename one of them in the program that saves",
        )
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise IntegrityError(f"a name of {len(name)} characters", code="E_NAME")
    check_tensor_name(name)


class _Roles:
    """Which part of a state is the model's, and which the optimizer's."""

    def __init__(self, paths: Iterable[Path]) -> None:
        known = list(paths)
        tops = {path[0] for path in known if len(path) > 1}
        self._skip = 0
        if len({path[:1] for path in known}) == 1 and tops & set(WRAPPER_KEYS):
            inner = {path[1] for path in known if len(path) > 2}
            if inner & {*MODEL_KEYS, *OPTIMIZER_KEYS}:
                self._skip, tops = 1, inner
        self._sections = tops & {*MODEL_KEYS, *OPTIMIZER_KEYS}

    def name(self, path: Path) -> str:
        """Return the canonical name of the tensor at ``path``."""
        path = path[self._skip :]
        top, rest = path[:1], path[1:]
        joined = ".".join(map(str, rest))
        if not path:
            return f"{MODEL}tensor"
        if rest and top[0] in OPTIMIZER_KEYS:
            return OPTIMIZER + _optimizer_name(rest)
        if rest and top[0] in RNG_KEYS:
            return f"rng/{joined}"
        if top[0] in RNG_KEYS:
            return f"rng/{top[0]}"
        if rest and top[0] in MODEL_KEYS:
            return MODEL + joined
        if not self._sections & set(MODEL_KEYS):
            return MODEL + ".".join(map(str, path))
        return f"{top[0]}/{joined}" if rest else str(top[0])

    def state_path(self, path: Path) -> Path:
        """Return where the value at ``path`` belongs in ``state``."""
        path = path[self._skip :]
        if path and path[0] in OPTIMIZER_KEYS:
            return ("optimizer", *_unflatten(path[1:]))
        if path and path[0] in MODEL_KEYS:
            return ("model", *path[1:])
        return path or ("value",)


def _optimizer_name(path: Path) -> str:
    """Return ``<slot>/<name>`` of a tensor of the optimizer."""
    path = _unflatten(path)
    if path[0] == "state" and len(path) > 2:
        slot = ".".join(map(str, path[2:]))
        return f"{slot}/{path[1]}"
    if len(path) > 1:
        return f"{path[0]}/{'.'.join(map(str, path[1:]))}"
    return str(path[0])


def _unflatten(path: Path) -> Path:
    """Undo torch's ``flatten_optimizer_state_dict``: ``state.<name>.<slot>``."""
    if len(path) == 1 and isinstance(path[0], str):
        head, _, rest = path[0].partition(".")
        name, _, last = rest.rpartition(".")
        if head in ("state", "param_groups") and name and last:
            return (head, name, last)
    return path


def _name_parameters(result: NamedState[T]) -> None:
    """Give the optimizer's numbered tensors the names of their parameters.

    torch numbers parameters in the order of the groups; which parameter has which
    number is known only if the groups say so (``param_names``), never from order: two
    parameters of one shape would be swapped without a sign.
    """
    numbered = [name for name in result.tensors if _is_numbered(name)]
    if not numbered:
        return
    names = _parameter_names(result.state.get("optimizer"))
    for name in numbered:
        slot, _, number = name.rpartition("/")
        if number in names:
            new = f"{slot}/{names[number]}"
            _check_name(new, result.tensors)
            result.tensors[new] = result.tensors.pop(name)
        elif not any(each.name == "optimizer.state" for each in result.ignored):
            result.ignored.append(
                Ignored(
                    "optimizer.state",
                    "the names of its parameters, which were not saved: its tensors "
                    "keep torch's numbers (optimizer/<slot>/<number>)",
                )
            )


def _is_numbered(name: str) -> bool:
    return name.startswith(OPTIMIZER) and name.rpartition("/")[2].isdecimal()


def _parameter_names(optimizer: Json) -> dict[str, str]:
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    names: dict[str, str] = {}
    for group in groups if isinstance(groups, list) else []:
        numbers = group.get("params") if isinstance(group, dict) else None
        called = group.get("param_names") if isinstance(group, dict) else None
        if not (isinstance(numbers, list) and isinstance(called, list)):
            return {}
        if len(numbers) != len(called) or not all(isinstance(c, str) for c in called):
            return {}
        names.update(zip(map(str, numbers), called, strict=True))
    return names if len(set(names.values())) == len(names) else {}


def nested_state(bundle: Bundle) -> dict[str, object]:
    """Return a bundle as a nested state, its leaves :class:`OutTensor` or JSON.

    A model alone is what ``model.state_dict()`` gives; else the model is in ``model``,
    the optimizer in ``optimizer``, as torch and its distributed checkpoints have it.

    Raises:
        ConfigError: two things would be in one place.
    """
    tensors = {**bundle.tensors}
    for alias, target in bundle.aliases.items():
        tensors[alias] = bundle.tensors[target]
    if not bundle.state and all(name.startswith(MODEL) for name in tensors):
        return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}
    root: dict[str, object] = {"model": {}}
    for name, tensor in tensors.items():
        _put(root, _path_of(name), tensor)
    for key, value in bundle.state.items():
        _merge(root, (key,), value)
    return root


def _path_of(name: str) -> tuple[str, ...]:
    section, _, rest = name.partition("/")
    if section == "optimizer" and "/" in rest:
        slot, _, parameter = rest.partition("/")
        return ("optimizer", "state", parameter, slot)
    return (section, rest) if rest else (section,)


def _merge(root: dict[str, object], path: tuple[str, ...], value: Json) -> None:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _merge(root, (*path, key), item)
    else:
        _put(root, path, value)


def _put(root: dict[str, object], path: tuple[str, ...], value: object) -> None:
    at = root
    for step in path[:-1]:
        below = at.setdefault(step, {})
        if not isinstance(below, dict):
            raise _clash(path)
        at = below
    if path[-1] in at:
        raise _clash(path)
    at[path[-1]] = value


def _clash(path: Path) -> ConfigError:
    return ConfigError(
        f"two things would be at {'.'.join(map(str, path))[:200]!r}",
        code="E_NAME",
        next_step="rename one of them",
    )
