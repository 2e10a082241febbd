"""Any module over one island with FSDP2: units, hooks, the shards as flat views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fabric.core.errors import ConfigError
from training.sharding import Cut, Piece
from training.worker.engines.native.hooks import GradientScatter, WeightGather
from training.worker.engines.native.space import Places, Space

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find_units(model: nn.Module) -> list[str]:
    """Return the modules to gather one by one: members of the outermost module lists.

    A module whose parameters are shared with another part of the model stays with the
    root. Name the units yourself where a list's members are not called one by one.
    """
    units: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{unit}.") for unit in units):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name:
            units += [
                f"{name}.{child}"
                for child, member in module.named_children()
                if any(p.requires_grad for p in member.parameters())
                and not isinstance(member, (nn.ModuleList, nn.ModuleDict))
            ]
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((u for u in units if name.startswith(f"{u}.")), "")
        owners.setdefault(id(parameter), set()).add(unit)
    shared = {unit for found in owners.values() if len(found) > 1 for unit in found}
    return [unit for unit in units if unit not in shared]


def survey(model: nn.Module, units: Sequence[str]) -> tuple[Space, list[nn.Module]]:
    """Return the flat space of a model, and the module of each unit, the root first.

    Raises:
        ConfigError: a parameter has no dimension: FSDP2 cannot cut it.
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    found: dict[str, _Unit] = {unit: _Unit([], []) for unit in ("", *units)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            aliases[name] = known
            continue
        if parameter.dim() == 0:
            raise ConfigError(
                f"{name!r} is a scalar parameter",
                code="E_SCALAR",
                next_step="give it the shape (1,)",
            )
        unit = found[next((u for u in units if name.startswith(f"{u}.")), "")]
        (unit.trained if parameter.requires_grad else unit.frozen).append(
            (name, tuple(parameter.shape))
        )
    found = {name: unit for name, unit in found.items() if unit.trained}
    tensors = [pair for unit in found.values() for pair in unit.trained]
    edges = [0, *accumulate(len(unit.trained) for unit in found.values())]
    space = Space(
        tuple(name for name, _ in tensors),
        tuple(shape for _, shape in tensors),
        tuple(len(shape) > 1 for _, shape in tensors),
        tuple(range(*pair) for pair in pairwise(edges)),
        tuple(tuple(shape for _, shape in unit.frozen) for unit in found.values()),
        {name: known for name, known in aliases.items() if known in dict(tensors)},
    )
    return space, [model.get_submodule(name) for name in found]


class _Unit(NamedTuple):
    trained: list[tuple[str, tuple[int, ...]]]
    frozen: list[tuple[str, tuple[int, ...]]]


def checkpoint_activations(modules: Sequence[nn.Module]) -> None:
    """Let modules forget what they computed, and compute it again going backward."""
    for module in modules:
        module.forward = partial(  # on the instance: names stay as they are
            checkpoint, module.forward, use_reentrant=False
        )


class Sharded:
    """A model whose trainable parameters are cut over one island.

    Args:
        model: Changed in place; on the CPU, or its parameters on the meta device.
        space: Of it.
        modules: Of the units; a root without parameters of its own is not among them.
        mesh: The island.
        precision: Of weights and computation.
        reshard: See ``fully_shard``: True = weights are gathered forward and backward;
            False = they stay in between; a number = they stay cut over so many ranks
            (hpZ of ZeRO++).
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        modules: Sequence[nn.Module],
        mesh: DeviceMesh,
        *,
        precision: Precision,
        reshard: bool | int,
    ) -> None:
        self._model, self._space = model, space
        dtype = DTYPES[precision]
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=True
        )
        every = list(modules)
        inner = [module for module in every if module is not model]
        for module in [*inner, model]:
            fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            self._materialise()
        self.modules = [_fsdp(module) for module in every]
        root = _fsdp(model)
        root.set_gradient_divide_factor(1.0)
        root.set_reduce_scatter_unused_params(True)
        for each in self.modules:
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)
            each._set_unshard_async_op(True)  # there is no public way
        for module, following in pairwise(inner):
            _fsdp(module).set_modules_to_forward_prefetch([_fsdp(following)])
        self._drop_gradients()

    def _materialise(self) -> None:
        """Give memory to our shards alone; their values are loaded later."""
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        self._model.to_empty(device="cpu")
        for name, buffer in self._model.named_buffers():
            buffer.copy_(buffers[name])
        for alias, name in self._space.aliases.items():  # they came apart
            parent, _, leaf = alias.rpartition(".")
            owner = self._model.get_submodule(parent)
            setattr(owner, leaf, self._model.get_parameter(name))

    def _drop_gradients(self) -> None:
        for _, parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(_forget_gradient)

    def parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the trainable parameters with their numbers in the space."""
        named = dict(self._model.named_parameters())
        for tensor, name in enumerate(self._space.names):
            yield tensor, named[name]

    def shards(self) -> dict[int, torch.Tensor]:
        """Return our part of each tensor, flat: views, without empty ones."""
        found = {}
        for tensor, parameter in self.parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local().detach()
            if local.numel():
                found[tensor] = local.view(-1)
        return found

    def gradient_places(self, cut: Cut) -> list[Places]:
        """Return, for each unit, where FSDP2 puts our pieces of its gradients.

        Args:
            cut: Our shard of all tensors.
        """
        numbers = {id(parameter): tensor for tensor, parameter in self.parameters()}
        mine = {piece.tensor: piece for piece in cut}
        units = []
        for module in self.modules:
            pieces: list[tuple[Piece, int]] = []
            at = 0
            groups = module._get_fsdp_state()._fsdp_param_groups
            for held in (p for group in groups for p in group.fsdp_params):
                tensor = numbers.get(id(held.sharded_param))
                if tensor is None:
                    continue  # frozen
                if tensor in mine:
                    pieces.append((mine[tensor], at))
                at += prod(held.padded_sharded_param_size)
            units.append(Places(pieces))
        return units

    def hook(
        self,
        gather: WeightGather,
        scatters: Sequence[GradientScatter],
        reduced: Callable[[int, torch.Tensor], None],
        needed: Callable[[int], None],
    ) -> None:
        """Put ourselves in the place of FSDP2's collectives.

        Args:
            gather: Of all units.
            scatters: Of each unit.
            reduced: Told a unit and FSDP2's output when its gradients are on the way.
            needed: Told a unit before its weights are read.
        """
        for unit, module in enumerate(self.modules):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatters[unit])
            module.set_all_reduce_hook(partial(reduced, unit))
            assert isinstance(module, nn.Module)
            module.register_forward_pre_hook(_before(needed, unit), prepend=True)


def island_mesh(group: dist.ProcessGroup, ranks: Sequence[int]) -> DeviceMesh:
    """Return the one-dimensional mesh of an island."""
    return DeviceMesh.from_group(group, "cpu", mesh=sorted(ranks))


def _before(needed: Callable[[int], None], unit: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object) -> None:
        needed(unit)

    return hook


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None  # it is on its way in our buffers


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
