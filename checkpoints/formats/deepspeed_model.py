"""The module's tensors in files of DeepSpeed's model states."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import msgspec

from checkpoints.formats.deepspeed_files import WHOLE, Loaded, parallel
from checkpoints.formats.deepspeed_groups import read_shapes
from checkpoints.formats.deepspeed_layout import Fragment, flat_tensor
from checkpoints.formats.extent_source import StoredTensor
from checkpoints.formats.pickle_values import TensorRef
from checkpoints.formats.source import MODEL, OPTIMIZER, Ignored
from fabric.core.errors import IntegrityError

COPIED = "the same elements as the optimizer's fp32 weights, which are read"
MASTER = f"{OPTIMIZER}fp32/"


class Model(msgspec.Struct):
    """What the files give.

    Attributes:
        tensors: Canonical name -> weights, buffers, fp32 weights beside others.
        aliases: Canonical name -> the one it shares its elements with.
        ignored: What is not carried over.
    """

    tensors: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    aliases: dict[str, str] = msgspec.field(default_factory=dict)
    ignored: list[Ignored] = msgspec.field(default_factory=list)


def read_model(
    files: Mapping[int, Loaded],
    experts: Mapping[str, tuple[Loaded, TensorRef]],
    masters: Mapping[str, StoredTensor],
) -> Model:
    """Return the module's tensors, each whole.

    Args:
        files: Model states: of each rank in stage 3, of one rank else.
        experts: Tensors of the experts' own files.
        masters: Name -> fp32 weights of the parameters that are trained.

    Raises:
        IntegrityError: a tensor has no elements in the files (``E_GAP``), or another
            shape than the optimizer has for it (``E_MIXED``).
    """
    model = Model()
    first = files[0]
    stored = {
        **{name: (first, ref) for name, ref in _module(first).items()},
        **experts,
    }
    shared = _shared(first)
    frozen = _frozen(files) if len(files) > 1 or _is_partitioned(first) else {}
    for name, tensor in masters.items():
        model.tensors[MODEL + name] = tensor
    for name, tensor in frozen.items():
        model.tensors[MODEL + name] = tensor
    for name, target in shared.items():
        model.aliases[MODEL + name] = MODEL + target
    seen: dict[TensorRef, str] = {}
    for name, (loaded, ref) in stored.items():
        tied = seen.setdefault(ref, name) if loaded is first and ref.shape else name
        if name in shared:
            continue
        if tied != name and name not in masters and 0 not in ref.shape:
            model.aliases[MODEL + name] = MODEL + tied
        elif name not in frozen:
            _add(model, name, loaded, ref, masters.get(name))
    if any(each.name == "module" for each in model.ignored):
        model.ignored = [Ignored("module", COPIED)]
    return model


def _add(
    model: Model, name: str, loaded: Loaded, ref: TensorRef, master: StoredTensor | None
) -> None:
    if master is None:
        model.tensors[MODEL + name] = loaded.archive.stored(ref)
        return
    if 0 in ref.shape and 0 not in master.shape:
        return  # the placeholder of a partitioned parameter
    if ref.shape != master.shape:
        raise IntegrityError(
            f"{name[:200]!r} is {list(ref.shape)} in {loaded.file} and "
            f"{list(master.shape)} in the optimizer",
            code="E_MIXED",
            next_step="files of two saves are mixed: use another copy",
        )
    if ref.dtype == master.dtype:
        model.ignored.append(Ignored("module", COPIED))
        return
    model.tensors[MODEL + name] = loaded.archive.stored(ref)
    model.tensors[MASTER + name] = master


def _module(loaded: Loaded) -> dict[str, TensorRef]:
    module = loaded.tree.get("module")
    if module is None:
        raise parallel(f"{loaded.file}: a pipeline, without a module")
    found: dict[str, TensorRef] = {}
    for name, value in loaded.mapping(module, "module").items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise loaded.refuse(
                f"{str(name)[:100]!r} of the module is no tensor: {WHOLE}"
            )
        found[name] = value
    return found


def _is_partitioned(loaded: Loaded) -> bool:
    """Return whether these are model states of stage 3 on one rank."""
    return loaded.file.startswith("zero_pp_rank_")


def _frozen(files: Mapping[int, Loaded]) -> dict[str, StoredTensor]:
    """Return the parameters that stage 3 partitions and does not train."""
    first = files[0]
    if first.tree.get("frozen_param_shapes") is None:
        return {}
    shapes = read_shapes(first, first.tree.get("frozen_param_shapes"))
    fragments = {
        rank: each.mapping(each.tree.get("frozen_param_fragments"), "frozen weights")
        for rank, each in files.items()
    }
    frozen: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        parts = {
            rank: files[rank].flat(each.get(name), f"frozen {name[:100]!r}")
            for rank, each in fragments.items()
        }
        numel = prod(shape)
        share = -(-numel // len(files))
        counts = {rank: max(0, min(share, numel - rank * share)) for rank in parts}
        pieces = [Fragment(rank, 0, count) for rank, count in counts.items() if count]
        frozen[name] = flat_tensor(name, shape, pieces, parts)
    return frozen


def _shared(loaded: Loaded) -> dict[str, str]:
    """Return name -> the name that holds its elements."""
    value = loaded.tree.get("shared_params")
    if value is None:
        return {}
    pairs = loaded.mapping(value, "shared_params").items()
    result: dict[str, str] = {}
    for name, target in pairs:
        if not isinstance(name, str) or not isinstance(target, str):
            raise loaded.refuse("shared_params are no names")
        result[name] = target
    return result
