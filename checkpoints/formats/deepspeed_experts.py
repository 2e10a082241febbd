"""Experts of DeepSpeed's own mixture-of-experts layers.

Each expert's weights are in a file of its own under the expert's global number, but the
optimizer's parts count the experts of a rank from zero. Taking one rank's for all gives
each expert another one's moments, without a word; so both are matched here, by the
ranks that share an expert, and a part that fits no expert is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from checkpoints.formats.deepspeed_files import REPAIR, Loaded, Tree
from checkpoints.formats.deepspeed_groups import (
    EXPERTS,
    Group,
    RankState,
    experts_per_rank,
    global_expert,
    read_group,
    renamed,
)
from checkpoints.formats.deepspeed_layout import Shape
from checkpoints.formats.pickle_values import TensorRef
from fabric.core.errors import IntegrityError


def read_groups(
    ranks: Mapping[int, RankState], shapes: Sequence[Mapping[str, Shape]]
) -> list[Group]:
    """Return all groups; one of experts once for each expert-parallel rank.

    Args:
        ranks: All ranks.
        shapes: Of each group's parameters, named as on rank 0.

    Raises:
        IntegrityError: the parts do not make up the parameters.
    """
    first = ranks[0].loaded
    count = len(ranks[0].masters)
    for each in ranks.values():
        if len(each.masters) != count or len(shapes) != count:
            raise each.loaded.refuse(
                f"{len(each.masters)} groups, {count} in rank 0's, {len(shapes)} of "
                "shapes"
            )
    local = experts_per_rank(name for group in shapes for name in group)
    groups: list[Group] = []
    for index, group_shapes in enumerate(shapes):
        if not any(EXPERTS in name for name in group_shapes):
            groups.append(read_group(ranks, index, group_shapes))
            continue
        if not all(EXPERTS in name for name in group_shapes):
            raise first.refuse(f"group {index} has experts and others")
        for expert_rank, shared in enumerate(_sharing(ranks, index)):
            names = {
                name: global_expert(
                    name, expert_rank * local[name[: name.index(EXPERTS)]]
                )
                for name in group_shapes
            }
            groups.append(renamed(read_group(shared, index, group_shapes), names))
    return groups


def _sharing(
    ranks: Mapping[int, RankState], index: int
) -> list[Mapping[int, RankState]]:
    """Return, for each expert-parallel rank, the ranks that have its experts."""
    world = len(ranks)
    counts = {str(each.of_group("partition_count", index)) for each in ranks.values()}
    copies = ranks[0].of_group("partition_count", index)
    if type(copies) is not int or copies < 1 or world % copies or len(counts) != 1:
        raise ranks[0].loaded.refuse(
            f"experts of group {index} in {', '.join(sorted(counts))} parts on "
            f"{world} ranks"
        )
    parallel = world // copies
    config = ranks[0].loaded.tree.get("ds_config")
    by_block = isinstance(config, dict) and config.get(
        "use_data_before_expert_parallelism", False
    )
    return [
        {
            rank: ranks[rank]
            for rank in (
                range(each * copies, (each + 1) * copies)
                if by_block
                else range(each, world, parallel)
            )
        }
        for each in range(parallel)
    ]


def expert_weights(files: Sequence[Loaded]) -> dict[str, tuple[Loaded, TensorRef]]:
    """Return the tensors of the experts' files, by name.

    Raises:
        IntegrityError: something else in them, or a name twice.
    """
    found: dict[str, tuple[Loaded, TensorRef]] = {}
    for loaded in files:
        for name, value in loaded.tree.items():
            if not isinstance(name, str) or not isinstance(value, TensorRef):
                raise loaded.refuse(f"{str(name)[:100]!r} is no tensor of an expert")
            if name in found:
                raise loaded.refuse(f"{name[:100]!r} is in two files", "E_MIXED")
            found[name] = loaded, value
    return found


def check_experts(
    groups: Sequence[Group], weights: Mapping[str, tuple[Loaded, TensorRef]]
) -> None:
    """Pass if the optimizer's experts and those of the files are the same.

    Raises:
        IntegrityError: they are not (``E_LAYOUT``).
    """
    for group in groups:
        for name, shape in group.shapes.items():
            if EXPERTS not in name:
                continue
            if name not in weights:
                raise IntegrityError(
                    f"the optimizer has {name[:200]!r}, no expert's file does",
                    code="E_MISSING_FILE",
                    next_step=REPAIR,
                )
            loaded, tensor = weights[name]
            if tensor.shape != shape:
                raise loaded.refuse(
                    f"{name[:200]!r} is {list(tensor.shape)}, {list(shape)} in the "
                    "optimizer"
                )


def is_autoep(tree: Tree) -> bool:
    """Return whether a model's experts were made by DeepSpeed's AutoEP."""
    return bool(tree.get("ds_autoep_layers") or tree.get("autoep_layers"))
