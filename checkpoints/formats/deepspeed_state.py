"""What a file of DeepSpeed's model states holds beside the model."""

from __future__ import annotations

from collections.abc import Mapping

from checkpoints.formats.deepspeed_files import NAMELESS, Loaded
from checkpoints.formats.extent_source import StoredTensor
from checkpoints.formats.pickle_values import Record, TensorRef
from checkpoints.formats.source import Ignored
from checkpoints.formats.state_leaves import leaves
from checkpoints.formats.state_names import name_state
from checkpoints.manifest import Json

ENGINE_KEYS = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "dp_world_size",
    "mp_world_size",
    "ds_version",
    "ds_config",
    "num_experts",
    "universal_checkpoint_info",
    "data_sampler",
    "random_ltd",
)
"""What the engine itself saves and restores."""

_ELSEWHERE = (
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "lr_scheduler",
    "checkpoint_parallel_dimensions",
    "ds_autoep_layers",
    "autoep_layers",
)


class EngineState:
    """State of an engine, with canonical names.

    Args:
        loaded: The file.
        more: What other files say, beside.
        nameless: The optimizer's states cannot be told apart.

    Attributes:
        state: What is no tensor: ``deepspeed``, ``lr_scheduler``, ``client`` (what the
            program saved beside), ``optimizer`` (if there is no ZeRO).
        tensors: By name.
        ignored: What has no JSON form.
    """

    def __init__(
        self, loaded: Loaded, more: Mapping[str, object], nameless: bool = False
    ) -> None:
        tree = loaded.tree
        client = {
            key: value
            for key, value in tree.items()
            if key not in _ELSEWHERE and key not in ENGINE_KEYS and value is not None
        }
        engine = {key: tree[key] for key in ENGINE_KEYS if tree.get(key) is not None}
        found: dict[str, object] = {
            "model": {},  # so that the rest is not taken for one
            "deepspeed": {**engine, **more},
            "lr_scheduler": tree.get("lr_scheduler"),
            "client": client,
            "optimizer": None if nameless else _plain_optimizer(tree.get("optimizer")),
        }
        kept = {key: each for key, each in found.items() if each not in (None, {})}
        named = name_state(list(leaves({"model": {}, **kept})), TensorRef)
        self.state: dict[str, Json] = named.state
        self.ignored: list[Ignored] = named.ignored
        if nameless:
            self.ignored.append(Ignored("optimizer", NAMELESS))
        self.tensors: dict[str, StoredTensor] = {
            name: loaded.archive.stored(ref) for name, ref in named.tensors.items()
        }


def _plain_optimizer(value: object) -> object:
    """Return an optimizer's state without ZeRO as torch has it.

    Those for bf16 and fp16 put fp32 weights beside the states of the optimizer that
    they wrap, in its order.
    """
    inner = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(inner, dict):
        return value
    states, groups = inner.get("state"), value.get("fp32_groups")
    rest = {key: each for key, each in value.items() if key != "optimizer_state_dict"}
    weights = [
        each
        for group in (groups if isinstance(groups, list) else ())
        for each in (group if isinstance(group, list) else ())
    ]
    if not isinstance(states, dict) or list(states) != list(range(len(weights))):
        return {**rest, **inner}
    if all(isinstance(each, dict) for each in states.values()):
        del rest["fp32_groups"]
        states = {key: {**states[key], "fp32": weights[key]} for key in states}
    return {**rest, **inner, "state": states}


def zero_state(optimizer: Mapping[object, object]) -> dict[str, object]:
    """Return what the engine restores of a ZeRO optimizer beside its elements."""
    state = {
        str(key): optimizer[key]
        for key in ("dynamic_loss_scale", "overflow", "clip_grad")
        if key in optimizer
    }
    if "loss_scaler" in optimizer:
        state["loss_scaler"] = _scaler(optimizer["loss_scaler"])
    return state


def _scaler(value: object) -> object:
    """Return a loss scaler as a dict of its attributes, or ``value``."""
    if isinstance(value, Record) and isinstance(value.state, dict):
        return {"class": value.kind.name, **value.state}
    return value
