"""Checkpoints of DeepSpeed engines: ZeRO stages 1, 2 and 3, and none.

What is read: fp32 weights, the optimizer's states and steps from the ranks' parts;
buffers, frozen and low-precision weights from the model's files; names that share a
tensor; schedulers, counters and what the program saved beside. A file of another save,
a part that is missing, and a layout that the files do not describe are refused; see
docs/deepspeed.md.

Names: ``model/<name>`` is what the module computes with. Where that is fp32, or where
the file has no copy of it (stage 3), it is the optimizer's own fp32 weights, as in
DeepSpeed's zero_to_fp32; where it is bf16 or fp16, those are ``optimizer/fp32/<name>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from checkpoints.formats.deepspeed_experts import (
    check_experts,
    expert_weights,
    is_autoep,
    read_groups,
)
from checkpoints.formats.deepspeed_files import (
    SAME_SAVE,
    WHOLE,
    Loaded,
    TagFiles,
    find_files,
    load,
    looks_like_tag,
    parallel,
    resolve_tag,
    same,
)
from checkpoints.formats.deepspeed_groups import RankState, read_rank, read_shapes
from checkpoints.formats.deepspeed_layout import Shape
from checkpoints.formats.deepspeed_model import read_model
from checkpoints.formats.deepspeed_optimizer import OptimizerTensors, read_optimizer
from checkpoints.formats.deepspeed_state import EngineState, zero_state
from checkpoints.formats.extent_source import ExtentSource
from checkpoints.formats.source import Ignored, Source
from checkpoints.manifest_checks import check_tensor_name
from fabric.core.errors import ConfigError, IntegrityError

FORMAT = "deepspeed"
LATEST = "latest"
ZERO_DIRECTORY = "zero"
"""A tag that has it is a universal checkpoint."""


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a tag, or the directory of some, of an engine."""
    tag = resolve_tag(path, LATEST) or path
    return looks_like_tag(tag) and not (tag / ZERO_DIRECTORY).is_dir()


def open_source(path: Path) -> Source:
    """Open a tag's directory, or the tag that ``latest`` in ``path`` names.

    Raises:
        ConfigError: neither (``E_FORMAT``).
        IntegrityError: damaged, mixed, not whole, hostile, or cut in a way that the
            files do not describe (``E_LAYOUT``).
    """
    tag = resolve_tag(path, LATEST) or path
    if tag != path and not tag.is_dir():
        raise IntegrityError(
            f"{path / LATEST} names {tag.name!r}, which is not there",
            code="E_MISSING_FILE",
            next_step="fetch it, or name the directory of another tag",
        )
    if not looks_like_tag(tag):
        raise ConfigError(
            f"{tag} has no model or optimizer states of DeepSpeed",
            code="E_FORMAT",
            next_step="name the directory of a tag, or the one with its `latest`",
        )
    files = find_files(tag)
    models = _load_models(tag, files)
    ranks = {rank: read_rank(load(tag, name)) for rank, name in files.optimizer.items()}
    _check_save(models, ranks)
    expert_files = [load(tag, name) for name in files.experts.values()]
    experts = expert_weights(expert_files)
    optimizer = OptimizerTensors()
    if ranks:
        groups = read_groups(ranks, _shapes(models[0]))
        check_experts(groups, experts)
        optimizer = read_optimizer(tag, ranks, groups)
    _check_step(models[0], optimizer)
    model = read_model(models, experts, optimizer.masters)
    zero: dict[str, object] = {"zero_stage": 0}
    if ranks:
        zero = {"zero_stage": ranks[0].stage, **zero_state(ranks[0].optimizer)}
    nameless = bool(experts) and not ranks
    engine = EngineState(models[0], zero, nameless)
    if optimizer.state:
        engine.state["optimizer"] = optimizer.state
    tensors = {**engine.tensors, **optimizer.tensors, **model.tensors}
    for name in (*tensors, *model.aliases):
        check_tensor_name(name)
    return ExtentSource(
        FORMAT,
        path,
        tag,
        tensors,
        aliases=model.aliases,
        state=engine.state,
        ignored=[
            *engine.ignored,
            *optimizer.ignored,
            *model.ignored,
            *(Ignored(name, why) for name, why in files.rest.items()),
        ],
        checksums=[
            each
            for loaded in (
                *models.values(),
                *(rank.loaded for rank in ranks.values()),
                *expert_files,
            )
            for each in loaded.archive.checksums
        ],
    )


def _load_models(tag: Path, files: TagFiles) -> dict[int, Loaded]:
    """Return the model states: of each rank in stage 3, of one rank else."""
    if files.weights and files.model:
        raise IntegrityError(
            f"{tag}: model states of stage 3 and of another one",
            code="E_MIXED",
            next_step=SAME_SAVE,
        )
    names = files.weights or ({0: files.model} if files.model else {})
    if not names:
        raise IntegrityError(
            f"{tag}: no model states",
            code="E_MISSING_FILE",
            next_step="the checkpoint is not whole: fetch the file",
        )
    models = {rank: load(tag, name) for rank, name in names.items()}
    tree = models[0].tree
    if is_autoep(tree):
        raise IntegrityError(
            f"{models[0].file}: experts cut by AutoEP",
            code="E_LAYOUT",
            next_step=WHOLE,
        )
    sizes = [tree.get("mp_world_size", 1)]
    degrees = tree.get("checkpoint_parallel_dimensions")
    if isinstance(degrees, dict):
        sizes += [degrees.get("tp_degree", 1), degrees.get("pp_degree", 1)]
    if any(size != 1 for size in sizes):
        raise parallel(f"{models[0].file}: tensor or pipeline parallel")
    return models


def _check_save(models: Mapping[int, Loaded], ranks: Mapping[int, RankState]) -> None:
    """Pass if the files are of one save, and are all of them."""
    for key in ("global_steps", "global_samples", "dp_world_size", "param_shapes"):
        same(key, {each.file: each.tree.get(key) for each in models.values()})
    if not ranks:
        if models[0].tree.get("param_shapes") is not None:
            raise _missing(models[0], "optimizer states")
        return
    states = ranks.values()
    for key in ("partition_count", "loss_scaler", "clip_grad", "overflow"):
        same(key, {each.loaded.file: each.optimizer.get(key) for each in states})
    same("the stage", {each.loaded.file: each.stage for each in states})
    same(
        "ds_version",
        {each.loaded.file: each.loaded.tree.get("ds_version") for each in states},
    )
    counts = ranks[0].optimizer.get("partition_count")
    saved_by = max(
        map(_integer, counts if isinstance(counts, list) else [counts]), default=-1
    )
    found = {"optimizer": len(ranks)} | (
        {"model": len(models)} if ranks[0].stage == 3 else {}
    )
    for what, number in found.items():
        if number != saved_by:
            raise IntegrityError(
                f"{what} states of {number} ranks, saved by {saved_by}",
                code="E_MISSING_FILE" if number < saved_by else "E_MIXED",
                next_step="files are missing, or of two saves: use another copy",
            )
    world = models[0].tree.get("dp_world_size", saved_by)
    if world != saved_by:
        raise IntegrityError(
            f"{models[0].file} is of {str(world)[:20]} ranks, the optimizer states of "
            f"{saved_by}",
            code="E_MIXED",
            next_step=SAME_SAVE,
        )


def _integer(value: object) -> int:
    return value if type(value) is int else -1


def _missing(loaded: Loaded, what: str) -> IntegrityError:
    return IntegrityError(
        f"{loaded.file} says there are {what}, but there is no file of them",
        code="E_MISSING_FILE",
        next_step="the checkpoint is not whole: fetch the files",
    )


def _check_step(model: Loaded, optimizer: OptimizerTensors) -> None:
    """Pass if the optimizer is not ahead of the model.

    It may be behind: it begins anew when a program loads the weights alone.
    """
    steps = model.tree.get("global_steps")
    if type(steps) is int and optimizer.step is not None and optimizer.step > steps:
        raise IntegrityError(
            f"the optimizer is at step {optimizer.step:g}, {model.file} at {steps}",
            code="E_MIXED",
            next_step=SAME_SAVE,
        )


def _shapes(loaded: Loaded) -> list[Mapping[str, Shape]]:
    value = loaded.tree.get("param_shapes")
    if not isinstance(value, list):
        raise loaded.refuse("no param_shapes in it")
    return [read_shapes(loaded, each) for each in value]
