"""The groups of DeepSpeed's ZeRO optimizers: whose elements lie in which rank's part.

It follows from the shapes, in the order in which they are saved. Stages 1 and 2 say it
a second time, in ``param_slice_mappings``; both must agree. The parameters of a group
of experts are not the same on all ranks: ranks of one expert-parallel rank share their
own, and a name counts a rank's experts from zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from checkpoints.formats.deepspeed_files import Loaded, Tree
from checkpoints.formats.deepspeed_layout import (
    Flat,
    Fragment,
    Shape,
    group_fragments,
    weights_fragments,
)
from checkpoints.formats.extent_source import StoredTensor
from checkpoints.formats.pickle_values import Record, TensorRef
from checkpoints.manifest import MAX_DIMS

EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
_EXPERT = re.compile(re.escape(EXPERTS) + r"(\d{1,6})(?=\.)")
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")


class Group(msgspec.Struct, frozen=True):
    """Parameters whose elements lie in the same parts.

    Attributes:
        index: Of the optimizer's group.
        shapes: By name, global if they are experts'.
        fragments: By name.
        masters: Rank -> its part of the weights.
        slots: Name of an optimizer state -> rank -> its part.
        scalars: Name of an optimizer state -> one value for all, per rank.
        numbers: The same for values that are no tensors.
    """

    index: int
    shapes: Mapping[str, Shape]
    fragments: Mapping[str, Sequence[Fragment]]
    masters: Mapping[int, Flat]
    slots: Mapping[str, Mapping[int, Flat]]
    scalars: Mapping[str, Mapping[int, StoredTensor]]
    numbers: Mapping[str, Mapping[int, object]]


class RankState(msgspec.Struct, frozen=True):
    """What a rank's file says of its optimizer.

    Attributes:
        loaded: The file.
        optimizer: DeepSpeed's own state.
        stage: ZeRO stage.
        masters: Weights of each group.
        states: The base optimizer's state of each group.
        options: Its param_groups; None in elastic checkpoints.
    """

    loaded: Loaded
    optimizer: Tree
    stage: int
    masters: Sequence[object]
    states: Sequence[Tree]
    options: object

    def of_group(self, key: str, index: int) -> object:
        """Return one group's value of a list of the optimizer's state."""
        values = self.optimizer.get(key)
        if isinstance(values, list) and index < len(values):
            return values[index]
        return None


def read_rank(loaded: Loaded) -> RankState:
    """Return what a file of optimizer states says.

    Raises:
        IntegrityError: it is none of ZeRO's (``E_LAYOUT``).
    """
    optimizer = loaded.mapping(loaded.tree.get("optimizer_state_dict"), "state")
    found = next((optimizer[key] for key in _MASTERS if key in optimizer), None)
    if not isinstance(found, list):
        raise loaded.refuse("no groups of fp32 weights in it")
    is_weights = _MASTERS[1] in optimizer
    stage = 3 if is_weights else stage_of(optimizer.get("zero_stage"))
    if stage != 3 and is_weights:
        raise loaded.refuse(f"stage {stage} with groups of stage 3")
    base = optimizer.get(
        "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    )
    states, options = _base_states(loaded, base, len(found))
    return RankState(loaded, optimizer, stage, found, states, options)


def stage_of(value: object) -> int:
    """Return ZeRO's stage; older versions and the bf16 optimizer do not say it."""
    if isinstance(value, Record) and value.args:
        (value, *_) = value.args
    return value if type(value) is int else 1


def _base_states(
    loaded: Loaded, base: object, count: int
) -> tuple[Sequence[Tree], object]:
    if isinstance(base, list):
        states = [loaded.mapping(each, "optimizer state") for each in base]
        options: object = None
    else:
        tree = loaded.mapping(base, "base optimizer")
        options = tree.get("param_groups")
        found = loaded.mapping(tree.get("state"), "optimizer state")
        keys = _parameter_ids(loaded, options)
        states = [loaded.mapping(found.get(key, {}), "optimizer state") for key in keys]
    if len(states) != count:
        raise loaded.refuse(f"{len(states)} optimizer states of {count} groups")
    return states, options


def _parameter_ids(loaded: Loaded, options: object) -> list[int]:
    keys: list[int] = []
    for group in options if isinstance(options, list) else ():
        ids = loaded.mapping(group, "param_groups").get("params")
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise loaded.refuse("no list of params in its param_groups")
        keys += ids
    return keys


def read_shapes(loaded: Loaded, value: object) -> dict[str, Shape]:
    """Return names and shapes of a dict of them.

    Raises:
        IntegrityError: it is none (``E_LAYOUT``).
    """
    shapes: dict[str, Shape] = {}
    for name, shape in loaded.mapping(value, "shapes").items():
        if not isinstance(name, str) or not isinstance(shape, tuple | list):
            raise loaded.refuse("no shape where one belongs")
        sizes = tuple(shape)
        if len(sizes) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in sizes):
            raise loaded.refuse(f"{name[:100]!r} has shape {str(sizes)[:60]}")
        shapes[name] = sizes
    return shapes


def read_group(
    ranks: Mapping[int, RankState], index: int, shapes: Mapping[str, Shape]
) -> Group:
    """Return a group of parameters that the given ranks share.

    Args:
        ranks: Those that have parts of it.
        index: The group's.
        shapes: Of its parameters, in its order, under their names in the files.

    Raises:
        IntegrityError: the ranks' parts do not make up the parameters.
    """
    masters = {
        rank: each.loaded.flat(each.masters[index], f"group {index}")
        for rank, each in ranks.items()
    }
    fragments = _fragments(ranks, index, shapes, masters)
    sizes = {rank: flat.size for rank, flat in masters.items()}
    slots: dict[str, dict[int, Flat]] = {}
    scalars: dict[str, dict[int, StoredTensor]] = {}
    numbers: dict[str, dict[int, object]] = {}
    for rank, each in ranks.items():
        for slot, value in each.states[index].items():
            if not isinstance(slot, str) or not slot or "/" in slot:
                raise each.loaded.refuse(f"optimizer state {str(slot)[:40]!r}")
            if not isinstance(value, TensorRef):
                numbers.setdefault(slot, {})[rank] = value
            elif value.shape == () or (value.shape == (1,) and sizes[rank] > 1):
                stored = each.loaded.archive.stored(value)
                scalars.setdefault(slot, {})[rank] = stored
            else:
                flat = _moment(each, index, value, slot, sizes[rank])
                slots.setdefault(slot, {})[rank] = flat
    return Group(index, shapes, fragments, masters, slots, scalars, numbers)


def _moment(
    each: RankState, index: int, value: TensorRef, slot: str, lean: int
) -> Flat:
    flat = each.loaded.flat(value, f"{slot!r} of group {index}")
    padding = each.of_group("group_paddings", index)
    allowed = {lean, lean + padding} if type(padding) is int else {lean}
    if flat.size not in allowed:
        raise each.loaded.refuse(
            f"{slot!r} of group {index} has {flat.size} elements, its weights {lean}"
        )
    return flat


def _fragments(
    ranks: Mapping[int, RankState],
    index: int,
    shapes: Mapping[str, Shape],
    masters: Mapping[int, Flat],
) -> dict[str, list[Fragment]]:
    order = sorted(ranks)
    first = ranks[order[0]]
    sizes = [masters[rank].size for rank in order]
    if first.stage == 3:
        if len(set(sizes)) != 1:
            raise first.loaded.refuse(
                f"group {index} has {sizes[:9]} elements on ranks"
            )
        local = weights_fragments(shapes, sizes[0], len(order))
    else:
        gaps = first.of_group("param_alignment_paddings", index)
        paddings = _paddings(first.loaded, gaps, len(shapes))
        local = group_fragments(shapes, paddings, sizes)
    found = {
        name: [Fragment(order[rank], start, numel) for rank, start, numel in each]
        for name, each in local.items()
    }
    if first.stage != 3 and not is_shuffled(first.loaded.tree):
        _check_mapping(ranks, index, found)
    return found


def _paddings(loaded: Loaded, gaps: object, count: int) -> list[int]:
    if gaps is None:
        return [0] * count
    if not (isinstance(gaps, list) and len(gaps) == count):
        raise loaded.refuse("paddings of another number of parameters")
    if not all(type(each) is int and 0 <= each < 2**53 for each in gaps):
        raise loaded.refuse("paddings are no numbers")
    return gaps


def is_shuffled(tree: Tree) -> bool:
    """Return whether the slice mappings are those of an order that was not used.

    With ``round_robin_gradients``, DeepSpeed lays parameters out in another order, the
    one of their shapes, and writes the slice mappings of the usual one.
    """
    config = tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


def _check_mapping(
    ranks: Mapping[int, RankState], index: int, found: Mapping[str, list[Fragment]]
) -> None:
    """Pass if the files' own slice mappings, where there are any, say the same.

    Raises:
        IntegrityError: they do not (``E_LAYOUT``).
    """
    for rank, each in ranks.items():
        value = each.of_group("param_slice_mappings", index)
        if value is None:
            continue
        said = {
            (name, address.field("start"), address.field("numel"))
            for name, address in each.loaded.mapping(value, "slice mapping").items()
            if isinstance(address, Record) and address.field("numel") != 0
        }
        computed = {
            (name, fragment.start, fragment.numel)
            for name, fragments in found.items()
            for fragment in fragments
            if fragment.rank == rank
        }
        if said != computed:
            differ = sorted(str(name)[:80] for name, *_ in said ^ computed)
            raise each.loaded.refuse(
                f"its slice mapping and its shapes disagree about {differ[0]!r}"
            )


def experts_per_rank(names: Iterable[str]) -> dict[str, int]:
    """Return how many experts of each layer a rank has."""
    result: dict[str, int] = {}
    for name in names:
        if match := _EXPERT.search(name):
            layer = name[: match.start()]
            result[layer] = max(result.get(layer, 0), int(match[1]) + 1)
    return result


def global_expert(name: str, first: int) -> str:
    """Return the name of an expert's parameter among all experts.

    Args:
        name: With the expert counted from zero on its rank.
        first: The rank's first expert.
    """
    return _EXPERT.sub(lambda match: f"{EXPERTS}{first + int(match[1])}", name, count=1)


def renamed(group: Group, names: Mapping[str, str]) -> Group:
    """Return a group with other names for its parameters."""
    return msgspec.structs.replace(
        group,
        shapes={names[name]: each for name, each in group.shapes.items()},
        fragments={names[name]: each for name, each in group.fragments.items()},
    )
