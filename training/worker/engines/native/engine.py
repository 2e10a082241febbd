"""The native engine: one model over nested islands, groups and domains of ranks.

A step, on every rank::

    k times: forward, backward     weights gathered in the island before use (FSDP2)
             gradients             -> island -> group, added to 4 N / d_g bytes
    the last backward also         -> domain -> world, 4 N / d_o bytes
    norm of all gradients          16 bytes to each rank; the same sum on every rank
    AdamW on 12 N / d_o bytes      unit by unit
    updated weights                domain -> groups -> islands, while the next unit is
                                   updated and the next forward pass computes

Every exchange of a unit is under way while other units compute (see ``pipeline``). With
forms that lose nothing, a step equals one process with AdamW on the same global batch,
whatever the degrees: that is the oracle of the tests. Domains of the same sizes stay
equal bit for bit; of others to fp32 rounding, which depends on where a tensor is cut.

A parameter without a gradient counts as one with gradient zero (torch's AdamW would
skip it): ranks of an island may use different parameters, but the modules of a unit are
called on all of them or on none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import nn

from fabric.core.errors import ConfigError, LocalProtocolError
from training.sharding import DOMAIN, ISLAND, WORLD, Geometry, Nesting, Ranks
from training.sharding_bytes import Form, Wires
from training.worker.engines.native.codec import QUANTISED
from training.worker.engines.native.flows import Lanes, Reducer, Updater
from training.worker.engines.native.hooks import GradientScatter, WeightGather
from training.worker.engines.native.lanes import Groups, Ledger, as_unavailable
from training.worker.engines.native.pipeline import Pipeline
from training.worker.engines.native.sharded import (
    Precision,
    Sharded,
    checkpoint_activations,
    find_units,
    island_mesh,
    survey,
)
from training.worker.engines.native.space import packed, spans, take
from training.worker.engines.native.states import (
    AdamW,
    Decays,
    MemoryStates,
    States,
    owned,
    update,
)

MakeStates = Callable[[Sequence[tuple[int, int]]], States]
LossOf = Callable[[nn.Module, Any], torch.Tensor]
"""Returns a scalar for a micro-batch: its mean loss."""


class Micro(NamedTuple):
    """A micro-batch.

    Attributes:
        inputs: For the loss function.
        share: Its part of the global batch; those of all ranks sum to 1. One of 0 is
            computed and counts nothing: all ranks take the same number of micro-steps.
    """

    inputs: Any
    share: float


class Taken(NamedTuple):
    """What a step did.

    Attributes:
        loss: Of the global batch.
        norm: Of all gradients, before clipping.
    """

    loss: float
    norm: float


class EngineConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How a model is trained.

    Attributes:
        nesting: Who holds what.
        optimizer: AdamW.
        wires: How elements travel.
        precision: Of weights and computation; master weights and sums are fp32.
        reshard: See :class:`Sharded`.
        checkpointing: Compute activations of units again instead of keeping them.
        units: Modules to gather one by one; None = found.
    """

    nesting: Nesting
    optimizer: AdamW = AdamW()
    wires: Wires = Wires()
    precision: Precision = "fp32"
    reshard: bool | int = True
    checkpointing: bool = False
    units: tuple[str, ...] | None = None


class ShardedEngine:
    """A model in training, one part of it on this rank; all ranks call alike.

    Args:
        model: Equal on every rank; changed in place. Parameters on the meta device
            get memory for our shards alone: load a checkpoint before the first step.
        loss_of: Computes the loss.
        config: See :class:`EngineConfig`.
        groups: Made for ``config.nesting``.
        make_states: Where optimizer states are kept; None = in memory.

    Attributes:
        space: Names and shapes.
        geometry: Who holds what of them.
        wires: How elements travel, the weights' own type filled in.
        ledger: Bytes sent.
        states: This rank's master weights and moments.
        owned: The pieces of the model whose states these are.
        model: The module, cut over the island.
        age: Steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        config: EngineConfig,
        groups: Groups,
        make_states: MakeStates = MemoryStates,
    ) -> None:
        _check(config)
        self.model, self._loss_of, self._config = model, loss_of, config
        self.rank = groups.rank
        self._world = groups.of(WORLD)
        self.ledger = Ledger(self.rank)
        self.wires = _own_types(config.wires, config.precision)
        units = find_units(model) if config.units is None else list(config.units)
        self.space, modules = survey(model, units)
        self.geometry = Geometry(self.space.shapes, config.nesting)
        self.owned = self.geometry.cuts[DOMAIN][self.rank]
        self.states = make_states(spans(self.owned, self.space.units))
        self.steer(config.optimizer)
        self._keep_initial(dict(model.named_parameters()))
        if config.checkpointing:
            checkpoint_activations([m for m in modules if m is not model])
        island = config.nesting.part(ISLAND, self.rank)
        self._sharded = Sharded(
            model,
            self.space,
            modules,
            island_mesh(groups.of(ISLAND), island),
            precision=config.precision,
            reshard=config.reshard,
        )
        lanes = Lanes(groups, self.geometry, self.ledger)
        self._reducer = Reducer(self.space, self.geometry, self.rank, lanes, self.wires)
        self._updater = Updater(
            self.space,
            self.geometry,
            self.rank,
            lanes,
            self.wires,
            self._sharded.shards(),
            config.precision,
        )
        self._hook(lanes, island)
        self._reductions, self._updates = Pipeline(), Pipeline()
        self._last = False
        self.age = 0

    def _keep_initial(self, parameters: dict[str, nn.Parameter]) -> None:
        for piece, master, _, _ in owned(self.states, self.owned):
            value = parameters[self.space.names[piece.tensor]].detach().reshape(-1)
            if not value.is_meta:
                master.copy_(value[piece.begin : piece.end])

    def _hook(self, lanes: Lanes, island: Sequence[int]) -> None:
        wires, members = self.wires, sorted(island)
        self._scatters = [
            GradientScatter(
                lanes.of(ISLAND), members, self.rank, wires.reduce_w, wires.block
            )
            for _ in self.space.units
        ]
        cut = self.geometry.cuts[ISLAND][self.rank]
        self._places = self._sharded.gradient_places(cut)
        self._alone = len(members) == 1
        gather = WeightGather(wires.gather_w, wires.block, self.ledger)
        self._sharded.hook(gather, self._scatters, self._reduced, self._needed)

    def step(
        self, micros: Sequence[Micro], *, learning_rate: float | None = None
    ) -> Taken:
        """Take one step on a global batch.

        Args:
            micros: This rank's part; as many as on every rank, at least one.
            learning_rate: None = the optimizer's.

        Raises:
            LocalProtocolError: ``E_DIVERGED`` on all ranks; the states are as before.
            Unavailable: a peer is gone; load a checkpoint into a new engine.
        """
        loss = self._accumulate(micros)
        norm, loss = self._agree(loss)
        if not math.isfinite(norm):
            self._reducer.forget()
            raise LocalProtocolError(
                f"gradient norm is {norm} at step {self.age}, loss {loss}",
                code="E_DIVERGED",
                next_step="go back to a checkpoint and lower the learning rate",
            )
        hyper = self._optimizer
        rate = hyper.learning_rate if learning_rate is None else learning_rate
        self._update(self._scale(norm), rate)
        self.age += 1
        return Taken(loss, norm)

    def evaluate(self, inputs: Any) -> float:  # noqa: ANN401  (the loss function's)
        """Return this rank's loss of ``inputs``; the ranks of an island call alike."""
        with torch.no_grad():
            return float(self._loss_of(self.model, inputs))

    def steer(self, optimizer: AdamW) -> None:
        """Take the settings of ``optimizer`` from the next step on."""
        self._optimizer = optimizer
        decays = [optimizer.weight_decay * decayed for decayed in self.space.decayed]
        self._decays = Decays(self.owned, decays)

    def forget_feedback(self) -> None:
        """Forget what quantising dropped: the weights are others than it was for."""
        self._reducer.forget()

    @property
    def partition(self) -> tuple[tuple[Ranks, ...], ...]:
        """Islands, groups and domains."""
        nesting = self.geometry.nesting
        return (nesting.islands, nesting.groups, nesting.domains)

    def settle(self) -> None:
        """Wait until the weights of the last step are everywhere."""
        self._updates.drain()

    def spread_weights(self) -> None:
        """Set all weights from the master weights, which were loaded or changed."""
        self._updates.drain()
        self._send_each(
            ((slab.unit, slab.master) for slab in self.states.slabs()), exact=True
        )
        self._updates.drain()

    def close(self) -> None:
        """Give the states' memory and files back."""
        self._updates.drop()
        self._reductions.drop()
        self.states.close()

    def _accumulate(self, micros: Sequence[Micro]) -> float:
        self._reducer.clear()
        total = 0.0
        for number, micro in enumerate(micros):
            self._last = number + 1 == len(micros)
            loss = self._loss_of(self.model, micro.inputs) * micro.share
            loss.backward()
            total += float(loss.detach())
        self._reductions.drain()
        return total

    def _needed(self, unit: int) -> None:
        """Finish the weights of a unit, and of the next, which is gathered early."""
        self._updates.finish(unit)
        self._updates.finish(unit + 1)

    def _reduced(self, unit: int, output: torch.Tensor) -> None:
        scatter = self._scatters[unit]
        total = partial(_same, output) if self._alone else scatter.finish()
        flow = self._reducer.flow(unit, total, self._places[unit], last=self._last)
        self._reductions.push(unit, flow)

    def _agree(self, loss: float) -> tuple[float, float]:
        """Return norm and loss of all ranks; the same bits on each."""
        counted = self.geometry.cuts[WORLD][self.rank]
        places = packed(self.geometry.cuts[DOMAIN][self.rank])
        square = 0.0
        if counted:
            mine = take(self._reducer.totals, places, counted)
            square = float(torch.linalg.vector_norm(mine, dtype=torch.float64)) ** 2
        size = self._world.size()
        told = torch.empty(2 * size, dtype=torch.float64)
        word = torch.tensor([square, loss], dtype=torch.float64)
        with as_unavailable():
            dist.all_gather_single(told, word, group=self._world)
        squares, losses = told.view(size, 2).T.tolist()
        for peer in dist.get_process_group_ranks(self._world):
            if peer != self.rank:
                self.ledger.add("norm", peer, 16)
        return math.sqrt(sum(squares)), sum(losses)

    def _scale(self, norm: float) -> float:
        limit = self._optimizer.grad_clip
        return min(1.0, limit / (norm + 1e-6)) if limit else 1.0

    def _update(self, scale: float, rate: float) -> None:
        self._updates.drain()
        totals = self._reducer.totals.mul_(scale) if scale < 1 else self._reducer.totals
        hyper = self._optimizer

        def updated() -> Iterator[tuple[int, torch.Tensor]]:
            for slab in self.states.sweep():
                end = slab.begin + slab.master.numel()
                update(
                    slab,
                    totals[slab.begin : end],
                    self._decays,
                    hyper,
                    age=self.age,
                    learning_rate=rate,
                )
                yield slab.unit, slab.master

        self._send_each(updated())

    def _send_each(
        self, masters: Iterable[tuple[int, torch.Tensor]], *, exact: bool = False
    ) -> None:
        """Send off units as their master weights come; every unit, also empty ones."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.space.units]
        unit = 0
        for number, master in masters:
            while unit < number:
                self._send(unit, parts[unit], exact=exact)
                parts[unit].clear()
                unit += 1
            parts[number].append(master.clone())
        for rest in range(unit, len(parts)):
            self._send(rest, parts[rest], exact=exact)

    def _send(self, unit: int, parts: list[torch.Tensor], *, exact: bool) -> None:
        values = torch.cat(parts) if parts else torch.empty(0)
        self._updates.push(unit, self._updater.flow(unit, values, exact=exact))


def _check(config: EngineConfig) -> None:
    """Refuse what cannot be.

    Raises:
        ConfigError: sets that do not nest, or hpZ where it is not defined.
    """
    config.nesting.check()
    islands, parts = config.nesting.islands, config.reshard
    if isinstance(parts, bool):
        return
    if len(islands) > 1 or not 1 < parts < len(islands[0]) or len(islands[0]) % parts:
        raise ConfigError(
            f"weights cannot stay cut over {parts} ranks of islands {islands}",
            code="E_RESHARD",
            next_step="choose a true divisor of the only island's size; "
            f"with several islands, make islands of {parts}",
        )


def _own_types(wires: Wires, precision: Precision) -> Wires:
    """Return the wires with weights that are not quantised in their own type."""

    def own(form: Form) -> Form:
        return form if form in QUANTISED else precision

    return msgspec.structs.replace(
        wires, gather_w=own(wires.gather_w), update=own(wires.update)
    )


def _same(output: torch.Tensor) -> torch.Tensor:
    return output
