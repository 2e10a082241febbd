"""A training program's state as tensors with canonical names, and JSON.

``model/<fqn>``, ``optimizer/<slot>/<fqn>`` and ``rng/<rank>/<device>`` are tensors;
param groups, the scheduler, the dataloader's position and Python's generator are JSON.
Loading fills the tensors in place; the JSON is put back by :func:`restore_optimizer`,
:func:`state_of` and :func:`restore_rng`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from checkpoints.formats.source import MODEL, OPTIMIZER
from checkpoints.manifest import Json
from checkpoints.param_groups import match_groups
from checkpoints.torch_io.pieces import Value
from checkpoints.torch_io.tensors import DTYPES, byte_view, dtype_name
from checkpoints.typed_json import from_json, to_json
from fabric.core.errors import ConfigError, IntegrityError

MAX_INLINE_BYTES = 64
"""Tensors in param groups (a learning rate of a captured graph) up to this are JSON."""


def model_tensors(state_dict: Mapping[str, Any]) -> dict[str, Value]:
    """Return a model's state_dict under canonical names.

    Raises:
        ConfigError: an entry is no tensor (a module's extra state): save it as state.
    """
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{name!r} is a {type(value).__qualname__}, no tensor",
                code="E_TENSOR",
                next_step="take it out, and save it with to_json as state",
            )
    return {f"{MODEL}{name}": value for name, value in state_dict.items()}


def optimizer_tensors(
    state_dict: Mapping[str, Any],
) -> tuple[dict[str, Value], dict[str, Json]]:
    """Return an optimizer's tensors under canonical names, and the rest as JSON.

    Args:
        state_dict: What ``torch.distributed.checkpoint.state_dict`` makes with
            ``get_optimizer_state_dict(model, optimizer)``: by parameter name.

    Raises:
        ConfigError: it is by parameter number, or holds what JSON cannot.
    """
    tensors: dict[str, Value] = {}
    numbers: dict[str, dict[str, Json]] = {}
    for fqn, slots in _by_name(state_dict).items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER}{slot}/{fqn}"] = value
            else:
                where = f"optimizer.state.{fqn}.{slot}"
                numbers.setdefault(fqn, {})[slot] = encode(value, where)
    groups = encode(state_dict.get("param_groups", []), "optimizer.param_groups")
    return tensors, {"param_groups": groups, "state": numbers}


def restore_optimizer(
    state_dict: MutableMapping[str, Any], state: Mapping[str, Json]
) -> None:
    """Put back what :func:`optimizer_tensors` returned as JSON.

    Args:
        state_dict: As for that; its tensors were filled by the load.
        state: ``Loaded.state["optimizer"]``.

    Raises:
        ConfigError: the optimizer has other param groups than were saved.
    """
    mine = state_dict.get("param_groups", [])
    found = match_groups(mine, state.get("param_groups", []))
    for group, options in zip(mine, found, strict=True):
        group.update({key: decode(value) for key, value in options.items()})
    held = state_dict.get("state", {})
    for fqn, slots in state.get("state", {}).items():
        if fqn in held:
            held[fqn].update({slot: decode(value) for slot, value in slots.items()})


def rng_tensors(rank: int) -> dict[str, Value]:
    """Return the states of torch's random generators of a rank."""
    states: dict[str, Value] = {f"rng/{rank}/cpu": torch.get_rng_state()}
    for number in range(torch.cuda.device_count()):
        states[f"rng/{rank}/cuda{number}"] = torch.cuda.get_rng_state(number)
    return states


def python_rng() -> Json:
    """Return the state of Python's generator, as JSON."""
    return to_json(random.getstate())


def restore_rng(
    rank: int, tensors: Mapping[str, Value], python: Json | None = None
) -> None:
    """Continue the random generators of a rank where they were.

    Args:
        rank: Whose states.
        tensors: What :func:`rng_tensors` returned, filled by the load.
        python: What :func:`python_rng` returned.
    """
    for name, value in tensors.items():
        if not name.startswith(f"rng/{rank}/") or not isinstance(value, torch.Tensor):
            continue
        device = name.rpartition("/")[2]
        if device == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, int(device.removeprefix("cuda")))
    if python is not None:
        try:
            random.setstate(from_json(python))  # type: ignore[arg-type]
        except (TypeError, ValueError) as exc:
            raise IntegrityError(f"random state: {exc}", code="E_STATE") from exc


def encode(value: object, where: str) -> Json:
    """Return a state (of a scheduler, a dataloader) as JSON.

    Raises:
        ConfigError: it holds what JSON cannot, or tensors of more than 64 bytes.
    """
    return to_json(value, where, _small_tensor)


def decode(value: Json) -> Any:  # noqa: ANN401
    """Return what :func:`encode` was given."""
    return from_json(value, _tensor_from)


def _small_tensor(value: object, where: str) -> Json:
    if not isinstance(value, torch.Tensor) or type(value) is not torch.Tensor:
        return None
    if value.numel() * value.element_size() > MAX_INLINE_BYTES:
        return None
    data = bytes(byte_view(value.detach().resolve_conj().cpu().contiguous()))
    return {"$tensor": [dtype_name(value.dtype), list(value.shape), data.hex()]}


def _tensor_from(key: str, body: Json) -> object:
    try:
        if key != "$tensor":
            raise ValueError(key)
        dtype, shape, data = body
        flat = torch.frombuffer(bytearray.fromhex(data), dtype=DTYPES[dtype])
        return flat.reshape(shape).clone()
    except (TypeError, ValueError, KeyError, RuntimeError) as exc:
        raise IntegrityError(f"state: {key[:40]!r}", code="E_STATE") from exc


def _by_name(state_dict: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    state = state_dict.get("state")
    if isinstance(state, Mapping) and all(isinstance(key, str) for key in state):
        return state
    raise ConfigError(
        "the optimizer's state is not by parameter name",
        code="E_OPTIMIZER",
        next_step="pass torch.distributed.checkpoint.state_dict."
        "get_optimizer_state_dict(model, optimizer)",
    )
