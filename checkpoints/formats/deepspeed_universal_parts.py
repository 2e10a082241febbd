"""What of a bundle goes where in a universal checkpoint of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from checkpoints.formats.deepspeed_groups import EXPERTS
from checkpoints.formats.sink import Bundle, OutTensor
from checkpoints.formats.source import MODEL, OPTIMIZER, Ignored
from checkpoints.manifest import Json
from fabric.core.errors import ConfigError

CLIENT = "client/"
_FP32 = f"{OPTIMIZER}fp32/"
_MAX_NAME_BYTES = 255
_HOMELESS = "no place for it in a universal checkpoint"


class Parts(msgspec.Struct, frozen=True):
    """A bundle, sorted.

    Attributes:
        masters: Name -> fp32 weights of what is trained.
        slots: Name -> optimizer state -> tensor, or number.
        module: What the module has beside them: buffers, frozen, low-precision weights.
        client: What the program saved.
        groups: Names of each group's parameters.
        ignored: What has no place.
    """

    masters: Mapping[str, OutTensor]
    slots: Mapping[str, Mapping[str, OutTensor | float]]
    module: Mapping[str, OutTensor]
    client: Mapping[str, OutTensor]
    groups: Sequence[Sequence[str]]
    ignored: Sequence[Ignored]


def sort_bundle(bundle: Bundle) -> Parts:
    """Return a bundle, sorted.

    Raises:
        ConfigError: see :meth:`UniversalSink.plan`.
    """
    optimizer = bundle.state.get("optimizer")
    tree = optimizer if isinstance(optimizer, dict) else {}
    slots = _slots(bundle, tree)
    if not slots:
        raise ConfigError(
            "no optimizer state: there is nothing to resume",
            code="E_NO_OPTIMIZER",
            next_step="write weights alone as huggingface, torch or canonical",
        )
    masters = {name: _master(bundle, name) for name in slots}
    used = {each.name for each in masters.values()}
    module: dict[str, OutTensor] = {}
    client: dict[str, OutTensor] = {}
    ignored = _homeless(bundle)
    for name, tensor in bundle.tensors.items():
        if name in used:
            continue
        if name.startswith(MODEL):
            module[name.removeprefix(MODEL)] = tensor
        elif name.startswith(CLIENT):
            client[name.removeprefix(CLIENT)] = tensor
        elif name.startswith(_FP32):
            ignored.append(Ignored(name, "the model's own weights are fp32"))
    for name in sorted({*masters, *module}):
        _check_name(name)
    return Parts(masters, slots, module, client, _groups(tree, masters), ignored)


def _homeless(bundle: Bundle) -> list[Ignored]:
    """Return what the format has no place for."""
    names = [
        name
        for name in bundle.tensors
        if not name.startswith((MODEL, OPTIMIZER, CLIENT))
    ]
    names += [
        alias
        for alias, target in bundle.aliases.items()
        if not alias.startswith(OPTIMIZER)
        and not (alias.startswith(MODEL) and target.startswith(MODEL))
    ]
    names += [f"state.{key}" for key in bundle.state if key not in _STATE_KEYS]
    return [Ignored(name, _HOMELESS) for name in sorted(names)]


_STATE_KEYS = ("deepspeed", "optimizer", "lr_scheduler", "client")


def _slots(
    bundle: Bundle, optimizer: Mapping[str, Json]
) -> dict[str, dict[str, OutTensor | float]]:
    """Return optimizer states by parameter; a parameter has some beside its weights."""
    found: dict[str, dict[str, OutTensor | float]] = {}
    tensors = {
        **bundle.tensors,
        **{alias: bundle.tensors[name] for alias, name in bundle.aliases.items()},
    }
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            slot, _, parameter = name.removeprefix(OPTIMIZER).partition("/")
            if slot != "fp32" and parameter:
                found.setdefault(parameter, {})[slot] = tensor
    numbers = optimizer.get("state")
    for parameter, values in (numbers if isinstance(numbers, dict) else {}).items():
        for slot, value in (values if isinstance(values, dict) else {}).items():
            if isinstance(value, int | float):
                found.setdefault(parameter, {})[slot] = value
    every = {slot for each in found.values() for slot in each}
    for parameter, each in found.items():
        lacks = sorted(every - each.keys())
        if lacks:
            raise ConfigError(
                f"{parameter!r} has no {lacks[0]!r}, others have",
                code="E_OPTIMIZER",
                next_step="DeepSpeed would go on with a stale one: train one step more",
            )
    return found


def _master(bundle: Bundle, name: str) -> OutTensor:
    """Return the weights that DeepSpeed trains: the module's own if those are fp32."""
    found: OutTensor | None = None
    for full in (MODEL + name, _FP32 + name):
        found = bundle.tensors.get(bundle.aliases.get(full, full), found)
        if found is not None and found.dtype == "F32":
            return found
    if found is None:
        raise ConfigError(
            f"the optimizer has states of {name!r}, which is no parameter",
            code="E_OPTIMIZER",
            next_step="DeepSpeed finds states by name: save the names with them",
        )
    raise ConfigError(
        f"{name!r} is {found.dtype}: a universal checkpoint has fp32 weights",
        code="E_DTYPE",
        next_step="convert it to F32 with the option for element types",
    )


def _groups(
    optimizer: Mapping[str, Json], masters: Mapping[str, OutTensor]
) -> list[list[str]]:
    """Return the names in each param group.

    Raises:
        ConfigError: not known: DeepSpeed gives options to groups by their place.
    """
    groups = optimizer.get("param_groups")
    names = [
        list(each["params"])
        for each in (groups if isinstance(groups, list) else ())
        if isinstance(each, dict) and isinstance(each.get("params"), list)
    ]
    flat = [name for group in names for name in group]
    if not names or sorted(map(str, flat)) != sorted(masters):
        raise ConfigError(
            "param_groups do not name the parameters that the optimizer has states of",
            code="E_OPTIMIZER",
            next_step="save the names with the optimizer, as torch's "
            "get_optimizer_state_dict does",
        )
    return names


def _check_name(name: str) -> None:
    if EXPERTS in name:
        raise ConfigError(
            f"{name[:100]!r}: DeepSpeed's loader counts the experts of each rank from "
            "zero and would give all ranks the first ones'",
            code="E_LAYOUT",
            next_step="write the canonical format; there is no universal one of these",
        )
    if (
        name in ("", ".", "..")
        or "/" in name
        or len(name.encode()) > _MAX_NAME_BYTES
        or not name.isprintable()
    ):
        raise ConfigError(
            f"{name[:100]!r} cannot be the name of a directory",
            code="E_NAME",
            next_step="rename it with a name map",
        )
