"""Writes DeepSpeed's universal checkpoints.

What is written loads into engines of ZeRO-1, 2 and 3 of any number of ranks: stage 3
looks for its model states and the optimizer's step elsewhere than the others, so both
are written twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from checkpoints.directories import sync_directory
from checkpoints.formats.deepspeed_state import ENGINE_KEYS
from checkpoints.formats.deepspeed_universal_parts import Parts, sort_bundle
from checkpoints.formats.pickle_values import Global
from checkpoints.formats.pickle_writer import Call, Instance
from checkpoints.formats.sink import (
    Bundle,
    OutTensor,
    Plan,
    PlannedFile,
    SinkOptions,
)
from checkpoints.formats.source import MODEL
from checkpoints.formats.torch_zip_writer import (
    NewArchive,
    NewEntry,
    tensor_call,
    whole_tensor,
)
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import FileEntry, Json
from fabric.core.errors import ConfigError

VERSION_INFO = {"universal_checkpoint_version": 0.2}
"""DeepSpeed's loaders ask for nothing newer if there is no tensor parallelism."""
WRITTEN_AS = "0.19.8"
"""Version of DeepSpeed whose loaders this follows; engines want one."""

_SCALERS = ("LossScaler", "DynamicLossScaler")
_SCALER_MODULE = "deepspeed.runtime.fp16.loss_scaler"


class UniversalSink:
    """Writes a tag and ``latest_universal``; see :mod:`checkpoints.formats.sink`."""

    format = "deepspeed-universal"

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """Return what would be written.

        Raises:
            ConfigError: there is no optimizer to go on with (``E_NO_OPTIMIZER``), its
                groups are not known (``E_OPTIMIZER``), weights are not fp32
                (``E_DTYPE``), or a name cannot be a directory's (``E_NAME``).
        """
        parts = sort_bundle(bundle)
        counters = bundle.state.get("deepspeed")
        known = counters if isinstance(counters, dict) else {}
        step = options.step or known.get("global_steps") or 0
        tag = f"global_step{step}_universal"
        files = [
            *_parameter_files(tag, parts),
            _optimizer_file(tag, bundle, parts, known),
            *_model_files(tag, bundle, parts, {**known, "global_steps": step}),
        ]
        return Plan(
            files,
            partial(_finish, tag=tag),
            ignored=parts.ignored,
            notes=_notes(bundle.state["optimizer"]["param_groups"]),
        )


def _notes(groups: Sequence[Mapping[str, Json]]) -> list[str]:
    options = [{k: v for k, v in each.items() if k != "params"} for each in groups]
    if all(each == options[0] for each in options):
        return []
    return [
        "an engine of ZeRO-3 gives all param groups the options of the first one when "
        "it loads: set the others' again"
    ]


def _parameter_files(tag: str, parts: Parts) -> Iterator[PlannedFile]:
    for name, weights in parts.masters.items():
        base = f"{tag}/zero/{name}"
        yield _file(f"{base}/fp32.pt", {"param": weights, "cat_dim": 0})
        for slot, value in parts.slots[name].items():
            whole = slot == "step" or not isinstance(value, OutTensor)
            content = value if whole else {"param": value, "cat_dim": 0}
            yield _file(f"{base}/{slot}.pt", content)


def _optimizer_file(
    tag: str, bundle: Bundle, parts: Parts, known: Mapping[str, Json]
) -> PlannedFile:
    saved = bundle.state["optimizer"]["param_groups"]
    groups = [
        {**{key: _option(key, value) for key, value in each.items()}, "params": [index]}
        for index, each in enumerate(saved)
    ]
    steps = [each["step"] for each in parts.slots.values() if "step" in each]
    state = {"step": steps[0]} if steps else {}
    content: dict[str, object] = {
        "ds_version": known.get("ds_version") or WRITTEN_AS,
        "zero_stage": known.get("zero_stage") or 1,
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: state}, "param_groups": groups},
    }
    for key in ("dynamic_loss_scale", "overflow", "clip_grad"):
        if key in known:
            content[key] = known[key]
    scaler = _scaler(known.get("loss_scaler"))
    if scaler is not None:
        content["loss_scaler"] = scaler
    planned = _file(f"{tag}/zero/optimizer_state.pt", content)

    def chunks() -> Iterator[Buffer]:
        _check_steps(steps)
        yield from planned.chunks()

    return msgspec.structs.replace(planned, chunks=chunks)


def _check_steps(steps: Sequence[OutTensor | float]) -> None:
    """Pass if all parameters are at one step: engines of stage 3 have only one.

    Raises:
        ConfigError: they are not (``E_OPTIMIZER``).
    """
    values = {
        b"".join(bytes(data) for data in step.read())
        if isinstance(step, OutTensor)
        else step
        for step in steps
    }
    if len(values) > 1:
        raise ConfigError(
            f"parameters at {len(values)} different steps",
            code="E_OPTIMIZER",
            next_step="DeepSpeed has one step for all: write another format",
        )


def _option(key: str, value: Json) -> object:
    return tuple(value) if key == "betas" and isinstance(value, list) else value


def _scaler(value: Json) -> object:
    """Return what makes DeepSpeed's loss scaler, if it is one of plain numbers."""
    if not isinstance(value, dict) or value.get("class") not in _SCALERS:
        return None
    state = {key: each for key, each in value.items() if key != "class"}
    if not all(
        each is None or isinstance(each, int | float) for each in state.values()
    ):
        return None
    return Instance(Global(_SCALER_MODULE, value["class"]), state)


def _model_files(
    tag: str, bundle: Bundle, parts: Parts, known: Mapping[str, Json]
) -> Iterator[PlannedFile]:
    state = _model_state(bundle, parts, known)
    yield _file(f"{tag}/mp_rank_00_model_states.pt", state)
    module = state["module"]
    assert isinstance(module, dict)
    names = state["buffer_names"]
    assert isinstance(names, list)
    buffers = {name: module[name] for name in names}
    yield _file(
        f"{tag}/zero_pp_rank_0_mp_rank_00_model_states.pt", {**state, "module": buffers}
    )


def _model_state(
    bundle: Bundle, parts: Parts, known: Mapping[str, Json]
) -> dict[str, object]:
    shapes = [
        {name: _size(parts.masters[name].shape) for name in group}
        for group in parts.groups
    ]
    shared = {
        alias.removeprefix(MODEL): target.removeprefix(MODEL)
        for alias, target in bundle.aliases.items()
        if alias.startswith(MODEL) and target.startswith(MODEL)
    }
    client = bundle.state.get("client")
    engine = {key: known[key] for key in ENGINE_KEYS if key in known}
    return {
        **(client if isinstance(client, dict) else {}),
        **parts.client,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "skipped_steps": 0,
        "ds_version": WRITTEN_AS,
        "ds_config": {},
        "universal_checkpoint_info": VERSION_INFO,
        **engine,
        "module": parts.module,
        "buffer_names": sorted(parts.module.keys() - parts.masters.keys()),
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": shared,
        "lr_scheduler": bundle.state.get("lr_scheduler"),
    }


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (shape,))


def _file(path: str, content: object) -> PlannedFile:
    """Plan an archive of ``content``, whose tensors are :class:`OutTensor`."""
    tensors: dict[str, tuple[str, OutTensor]] = {}
    value = _with_calls(content, tensors)
    storages = [
        NewEntry(key, tensor.size_bytes, tensor.read)
        for key, tensor in tensors.values()
    ]
    archive = NewArchive(value, storages)
    return PlannedFile(path, tuple(tensors), archive.size, archive.chunks)


def _with_calls(value: object, tensors: dict[str, tuple[str, OutTensor]]) -> object:
    if isinstance(value, OutTensor):
        key, _ = tensors.setdefault(value.name, (str(len(tensors)), value))
        size = value.size_bytes
        return tensor_call(whole_tensor(key, value.dtype, value.shape, size))
    if isinstance(value, Mapping):
        return {key: _with_calls(each, tensors) for key, each in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, Global):
        return type(value)(_with_calls(each, tensors) for each in value)
    return value


def _finish(directory: Path, files: Mapping[str, FileEntry], *, tag: str) -> None:
    """Write the name of the tag, as ds_to_universal does."""
    path = directory / "latest_universal"
    with path.open("w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


SINK = UniversalSink()
