"""DeepSpeed's universal checkpoints: one file per parameter and optimizer state.

``TAG/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt`` hold whole tensors, as
ds_to_universal writes them; the rest is in files of model states. A parameter without
a state that others have is refused: DeepSpeed would go on with what its optimizer
happened to have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import msgspec

from checkpoints.boxes import whole
from checkpoints.formats.checksums import Checksum
from checkpoints.formats.deepspeed_files import (
    MODULES,
    REPAIR,
    SAME_SAVE,
    Loaded,
    list_names,
    load,
    model_files,
    resolve_tag,
)
from checkpoints.formats.deepspeed_groups import (
    experts_per_rank,
    is_shuffled,
    read_shapes,
    stage_of,
)
from checkpoints.formats.deepspeed_layout import Shape
from checkpoints.formats.deepspeed_model import Model, read_model
from checkpoints.formats.deepspeed_optimizer import named_groups
from checkpoints.formats.deepspeed_state import EngineState, zero_state
from checkpoints.formats.deepspeed_universal_sink import SINK as SINK
from checkpoints.formats.extent_source import Extent, ExtentSource, StoredTensor
from checkpoints.formats.pickle_values import TensorRef
from checkpoints.formats.source import MODEL, OPTIMIZER, Ignored, Source
from checkpoints.formats.torch_zip import Archive, read_archive
from checkpoints.manifest import Json
from checkpoints.manifest_checks import check_tensor_name
from fabric.core.errors import ConfigError, IntegrityError

FORMAT = "deepspeed-universal"
POINTERS = ("latest_universal", "latest")
ZERO = "zero"
OPTIMIZER_FILE = f"{ZERO}/optimizer_state.pt"
COPY = "a copy of what is in the model states"


class _Found(msgspec.Struct):
    """What the files of the parameters give.

    Attributes:
        masters: Name -> fp32 weights of what is trained.
        tensors: Canonical name -> optimizer state.
        slots: Name -> what there is of it.
        copies: Name -> weights or buffers without optimizer state.
        values: Name -> optimizer states that are no tensors.
        copies: The same of what is not.
        ignored: What is not carried over.
        checksums: Of the files' storages.
    """

    masters: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    tensors: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    slots: dict[str, frozenset[str]] = msgspec.field(default_factory=dict)
    copies: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    values: dict[str, dict[str, Json]] = msgspec.field(default_factory=dict)
    ignored: list[Ignored] = msgspec.field(default_factory=list)
    checksums: list[Checksum] = msgspec.field(default_factory=list)


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a universal tag, or the directory of one."""
    return _tag(path) is not None


def _tag(path: Path) -> Path | None:
    named = (resolve_tag(path, pointer) for pointer in POINTERS)
    for tag in (*named, path):
        if tag is not None and (tag / OPTIMIZER_FILE).is_file():
            return tag
    return None


def open_source(path: Path) -> Source:
    """Open a universal tag, or the one that ``latest_universal`` in ``path`` names.

    Raises:
        ConfigError: neither (``E_FORMAT``).
        IntegrityError: damaged, mixed, not whole, or hostile.
    """
    tag = _tag(path)
    if tag is None:
        raise ConfigError(
            f"{path} has no {OPTIMIZER_FILE}",
            code="E_FORMAT",
            next_step="name the directory of a tag, or the one with latest_universal",
        )
    names, unread, cut = model_files(tag)
    if 0 not in names:
        raise IntegrityError(
            f"{tag}: no model states of rank 0",
            code="E_MISSING_FILE",
            next_step="the checkpoint is not whole: fetch the file",
        )
    models = {rank: load(tag, name) for rank, name in names.items()}
    optimizer = load(tag, OPTIMIZER_FILE)
    _check_order(models[0], optimizer)
    groups = _groups(models[0])
    found = _read_parameters(tag, {} if cut else _merged(groups))
    _check_experts(models[0], found)
    _add_steps(found, optimizer, groups)
    model = _whole_model(models[0], found) if cut else _model(models, found)
    stage = stage_of(optimizer.tree.get("zero_stage"))
    engine = EngineState(models[0], {"zero_stage": stage, **zero_state(optimizer.tree)})
    options, ignored = named_groups(
        optimizer, optimizer.tree.get("param_groups"), list(map(list, groups))
    )
    engine.state["optimizer"] = {"param_groups": options}
    if found.values:
        engine.state["optimizer"]["state"] = found.values
    tensors = {**engine.tensors, **found.tensors, **model.tensors}
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
            *found.ignored,
            *ignored,
            *model.ignored,
            *(Ignored(name, why) for name, why in unread.items()),
        ],
        checksums=[
            *found.checksums,
            *optimizer.archive.checksums,
            *(sum_ for each in models.values() for sum_ in each.archive.checksums),
        ],
    )


def _check_experts(loaded: Loaded, found: _Found) -> None:
    """Pass if no experts of DeepSpeed's own layers are counted per rank.

    Raises:
        IntegrityError: they are: which expert's states these are is lost.
    """
    layers = experts_per_rank(found.masters)
    counts = loaded.tree.get("num_experts")
    known = counts if isinstance(counts, list) else [counts]
    if layers and sorted(map(str, layers.values())) != sorted(map(str, known)):
        raise IntegrityError(
            f"states of {sum(layers.values())} experts of {str(known)[:60]}",
            code="E_LAYOUT",
            next_step="read the checkpoint that it was converted from",
        )


def _check_order(loaded: Loaded, optimizer: Loaded) -> None:
    """Pass if it was not made by slice mappings of another order.

    Raises:
        IntegrityError: ds_to_universal made it of a checkpoint with
            ``round_robin_gradients``: its tensors hold each other's elements.
    """
    parts = optimizer.tree.get("partition_count")  # copied there by ds_to_universal
    several = isinstance(parts, list) and any(each != 1 for each in parts)
    if several and is_shuffled(loaded.tree):
        raise IntegrityError(
            f"{loaded.file}: ds_to_universal made it of a checkpoint with "
            "round_robin_gradients, and mixed its tensors up",
            code="E_LAYOUT",
            next_step="read the checkpoint that it was converted from",
        )


def _groups(loaded: Loaded) -> list[dict[str, Shape]]:
    value = loaded.tree.get("param_shapes")
    if not isinstance(value, list):
        raise loaded.refuse("no param_shapes in it")
    return [read_shapes(loaded, each) for each in value]


def _merged(groups: Sequence[Mapping[str, Shape]]) -> dict[str, Shape]:
    return {name: shape for group in groups for name, shape in group.items()}


def _read_parameters(tag: Path, shapes: Mapping[str, Shape]) -> _Found:
    """Read what is in ``zero/``.

    Args:
        tag: The checkpoint.
        shapes: Of the parameters that are trained; of a model that was cut, none.

    Raises:
        IntegrityError: states that do not fit, or are missing.
    """
    found = _Found()
    for name in list_names(tag / ZERO):
        if (tag / ZERO / name).is_dir():
            _read_parameter(found, tag, name, shapes)
    missing = sorted(shapes.keys() - found.masters.keys())
    if missing:
        raise IntegrityError(
            f"{tag / ZERO / missing[0]}: no weights in it",
            code="E_MISSING_FILE",
            next_step="the checkpoint is not whole: fetch it again",
        )
    slots = frozenset().union(*(found.slots[name] for name in found.masters))
    for name in found.masters:
        lacks = sorted(slots - found.slots[name])
        if lacks:
            raise IntegrityError(
                f"{ZERO}/{name}: no {lacks[0]}.pt, which others have",
                code="E_GAP",
                next_step="DeepSpeed would go on with a stale one: fetch it again",
            )
    return found


def _read_parameter(
    found: _Found, tag: Path, name: str, shapes: Mapping[str, Shape]
) -> None:
    files = [file for file in list_names(tag / ZERO / name) if file.endswith(".pt")]
    slots = {file.removesuffix(".pt") for file in files}
    if "fp32" not in slots:
        raise IntegrityError(
            f"{ZERO}/{name}: no fp32.pt",
            code="E_MISSING_FILE",
            next_step="the checkpoint is not whole: fetch it again",
        )
    archive = read_archive(tag, f"{ZERO}/{name}/fp32.pt", modules=MODULES)
    found.checksums += archive.checksums
    weights = _whole_tensor(archive, shapes.get(name))
    if name not in shapes and slots == {"fp32"}:
        found.copies[name] = weights
        return
    found.masters[name] = weights
    found.slots[name] = frozenset(slots)
    for slot in sorted(slots - {"fp32"}):
        archive = read_archive(tag, f"{ZERO}/{name}/{slot}.pt", modules=MODULES)
        found.checksums += archive.checksums
        if isinstance(archive.value, int | float):
            found.values.setdefault(name, {})[slot] = archive.value
            continue
        shape = None if slot == "step" else weights.shape
        stored = _whole_tensor(archive, shape)
        found.tensors[f"{OPTIMIZER}{slot}/{name}"] = stored


def _whole_tensor(archive: Archive, shape: Shape | None) -> StoredTensor:
    """Return the tensor in a file, in ``shape`` if it is known.

    Raises:
        IntegrityError: none, or of another number of elements (``E_MIXED``).
    """
    value = archive.value
    if isinstance(value, dict):
        value = value.get("param")
    if not isinstance(value, TensorRef):
        raise IntegrityError(
            f"{archive.file}: no tensor in it", code="E_LAYOUT", next_step=REPAIR
        )
    stored = archive.stored(value)
    if shape is None or shape == stored.shape:
        return stored
    if prod(shape) != prod(stored.shape) or any(
        extent.strides is not None for extent in stored.extents
    ):
        raise IntegrityError(
            f"{archive.file}: {list(stored.shape)} where {list(shape)} belongs",
            code="E_MIXED",
            next_step=SAME_SAVE,
        )
    extents = tuple(
        Extent(whole(shape), each.file, each.begin) for each in stored.extents
    )
    return StoredTensor(stored.dtype, shape, extents)


def _add_steps(
    found: _Found, optimizer: Loaded, groups: Sequence[Mapping[str, Shape]]
) -> None:
    """Add the steps of stage 3, which are in the optimizer's file alone."""
    inner = optimizer.tree.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, dict) else None
    if not isinstance(states, dict) or any("step" in s for s in found.slots.values()):
        return
    for index, group in enumerate(groups):
        state = states.get(index)
        step = state.get("step") if isinstance(state, dict) else None
        for name in group:
            if isinstance(step, TensorRef):
                stored = optimizer.archive.stored(step)
                found.tensors[f"{OPTIMIZER}step/{name}"] = stored
            elif isinstance(step, int | float):
                found.values.setdefault(name, {})["step"] = step


def _model(models: Mapping[int, Loaded], found: _Found) -> Model:
    """Return the module's tensors; of a tensor saved twice, the module's own."""
    model = read_model(models, {}, found.masters)
    known = {*model.tensors, *model.aliases}
    for name, stored in found.copies.items():
        if MODEL + name in known:
            model.ignored.append(Ignored(f"{ZERO}/{name}", COPY))
        else:
            model.tensors[MODEL + name] = stored
    return model


def _whole_model(loaded: Loaded, found: _Found) -> Model:
    """Return the tensors of a model that was cut: those that were put together."""
    weights = {**found.copies, **found.masters}
    tensors = {MODEL + name: stored for name, stored in weights.items()}
    note = Ignored(loaded.file, "buffers: a rank's own, of a model that was cut")
    return Model(tensors, {}, [note])
