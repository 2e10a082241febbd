"""The ranks of a site as one participant of the outer loop.

Rank 0 *leads*: it is the process that talks with the daemon and with other sites, and
its :class:`Site` is the engine of its Trainer. The other ranks *follow*: they do what
the leader's orders say, each on its share of the batch. An order goes to all ranks in
one broadcast; then all take part in what it asks for.

Between orders a follower waits in a broadcast, so the process groups' timeout must be
longer than an outer exchange. When the leader ends or a rank fails, the broadcast
fails on every rank, and the site starts again from a state that others serve.

The leader holds the flat vector when the outer loop asks for it: the outer state is
whole on each participant anyhow (see :mod:`training.worker.outer`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn

from fabric.core.errors import IntegrityError
from fabric.jobs.spec import ModelSpec, TrainSpec
from training.sharding import DOMAIN, WORLD
from training.worker import llama
from training.worker.adamw import BETAS
from training.worker.engine import initial_values, scheduled_rate
from training.worker.engines.native.engine import (
    EngineConfig,
    MakeStates,
    Micro,
    ShardedEngine,
)
from training.worker.engines.native.lanes import Groups, Lane, as_unavailable
from training.worker.engines.native.states import AdamW, MemoryStates, owned

LEADER = 0
MAX_ORDER_BYTES = 64 << 20
"""A batch of text is far below; what is larger was not sent by our leader."""


class _Step(msgspec.Struct, frozen=True, tag="step"):
    windows: list[bytes]
    progress: float


class _Evaluate(msgspec.Struct, frozen=True, tag="evaluate"):
    windows: list[bytes]


class _Steer(msgspec.Struct, frozen=True, tag="steer"):
    train: TrainSpec


class _Collect(msgspec.Struct, frozen=True, tag="collect"):
    pass


class _Load(msgspec.Struct, frozen=True, tag="load"):
    pass


class _Stop(msgspec.Struct, frozen=True, tag="stop"):
    pass


_Order = _Step | _Evaluate | _Steer | _Collect | _Load | _Stop


class Site:
    """One rank of a site; on the leader, an ``Engine`` for the outer loop.

    Args:
        model: What is trained.
        train: Inner optimisation; its batch is the site's.
        config: Nesting and wires; its optimizer is filled in from ``train``.
        groups: Made for the nesting.
        micro_windows: Sequences of a micro-batch.
        make_states: Where optimizer states are kept.

    Attributes:
        engine: This rank's part.
    """

    def __init__(
        self,
        model: ModelSpec,
        train: TrainSpec,
        config: EngineConfig,
        groups: Groups,
        *,
        micro_windows: int = 8,
        make_states: MakeStates = MemoryStates,
    ) -> None:
        llama.check_model(model)
        self._spec, self._train, self._micro = model, train, micro_windows
        self.shapes = llama.parameter_shapes(model)
        config = msgspec.structs.replace(config, optimizer=_optimizer(train))
        self.engine = ShardedEngine(
            _module(model, train.seed), _loss, config, groups, make_states
        )
        self._rank, self._world = groups.rank, groups.of(WORLD)
        members = config.nesting.world
        self._lane = Lane(self._world, members, self.engine.ledger, idle=False)
        self._size = len(members)
        self._begins: dict[str, int] = {}
        at = 0
        for name, shape in self.shapes.items():
            self._begins[name] = at
            at += math.prod(shape)
        self._numel = at

    @property
    def flat(self) -> torch.Tensor:
        """(N,) fp32: the master weights of all ranks, collected."""
        self._tell(_Collect())
        return self._collect()

    def config_json(self) -> dict[str, Any]:
        """Return the model's config.json, as transformers reads it."""
        return llama.config_json(self._spec)

    def steer(self, train: TrainSpec) -> None:
        """Take learning rate, weight decay and clipping of ``train`` from now on."""
        self._tell(_Steer(train))
        self._steer(train)

    def load(self, flat: torch.Tensor) -> None:
        """Set all parameters; the optimiser's moments stay, as DiLoCo has it."""
        self._tell(_Load())
        self._load(flat)

    def named_tensors(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of ``flat`` by parameter name."""
        return {
            name: flat[begin : begin + math.prod(self.shapes[name])].view(
                self.shapes[name]
            )
            for name, begin in self._begins.items()
        }

    def step(self, windows: Sequence[bytes], progress: float) -> float:
        """Take one AdamW step on all ranks and return the loss, nats per token."""
        self._tell(_Step(list(windows), progress))
        return self._step(windows, progress)

    def evaluate(self, windows: Sequence[bytes]) -> float:
        """Return the mean loss, nats per token; each rank computes a share."""
        self._tell(_Evaluate(list(windows)))
        return self._evaluate(windows)

    def close(self) -> None:
        """End the followers, and this rank's engine."""
        self._tell(_Stop())
        self.engine.close()

    def follow(self) -> None:
        """Do what the leader orders until it closes; the other ranks' main loop.

        Raises:
            Unavailable: a rank is gone.
            FabricError: what a step raised, on all ranks alike.
        """
        while True:
            match self._hear():
                case _Step(windows, progress):
                    self._step(windows, progress)
                case _Evaluate(windows):
                    self._evaluate(windows)
                case _Steer(train):
                    self._steer(train)
                case _Collect():
                    self._collect()
                case _Load():
                    self._load(None)
                case _Stop():
                    self.engine.close()
                    return

    def _tell(self, order: _Order) -> None:
        data = bytearray(msgspec.msgpack.encode(order))
        self._broadcast(torch.tensor([len(data)]))
        self._broadcast(torch.frombuffer(data, dtype=torch.uint8))

    def _hear(self) -> _Order:
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size)
        if not 0 < int(size) <= MAX_ORDER_BYTES:
            raise IntegrityError(f"an order of {int(size)} B", code="E_ORDER")
        data = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(data)
        return _order_untrusted(data.numpy().tobytes())

    def _broadcast(self, data: torch.Tensor) -> None:
        with as_unavailable():
            dist.broadcast(data, LEADER, group=self._world)

    def _step(self, windows: Sequence[bytes], progress: float) -> float:
        rate = scheduled_rate(self._train, self.engine.age, progress)
        micros = self._share(windows, self._micro)
        return self.engine.step(micros, learning_rate=rate).loss

    def _evaluate(self, windows: Sequence[bytes]) -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for micro in self._share(windows, self._micro):
            loss = self.engine.evaluate(micro.inputs)
            if micro.share:
                total += loss * micro.share
        with as_unavailable():
            dist.all_reduce(total, group=self._world)
        return float(total)

    def _share(self, windows: Sequence[bytes], most: int) -> list[Micro]:
        """Return this rank's micro-batches; each rank has as many, some perhaps empty.

        Returns:
            Those of all ranks hold each window once, in order.
        """
        ours = [len(windows) * (self._rank + n) // self._size for n in (0, 1)]
        largest = -(-len(windows) // self._size)
        micros = []
        for begin in range(ours[0], ours[0] + largest, most):
            part = windows[begin : min(begin + most, ours[1])]
            share = len(part) / len(windows)
            micros.append(Micro(_tokens(part or windows[:1]), share))
        return micros

    def _steer(self, train: TrainSpec) -> None:
        self._train = train
        self.engine.steer(_optimizer(train))

    def _collect(self) -> torch.Tensor:
        """Send our master weights to the leader, once for the world; it returns all."""
        geometry = self.engine.geometry
        first = geometry.nesting.part(DOMAIN, LEADER)
        mine = [each.master for each in owned(self.engine.states, self.engine.owned)]
        packed = torch.cat([*mine, torch.empty(0)])
        sends, sizes = {}, {}
        if self._rank in first and self._rank != LEADER and packed.numel():
            sends[LEADER] = packed.view(torch.uint8)
        if self._rank == LEADER:
            held = {peer: geometry.held(DOMAIN, peer) for peer in first}
            sizes = {p: 4 * n for p, n in held.items() if n and p != LEADER}
        received = self._lane.swap("outer_out", sends, sizes).wait()
        if self._rank != LEADER:
            return packed
        flat = torch.empty(self._numel)
        for peer, data in {**received, LEADER: packed.view(torch.uint8)}.items():
            self._each_piece(peer, flat, data.view(torch.float32), into=False)
        return flat

    def _load(self, flat: torch.Tensor | None) -> None:
        """Give each rank the master weights that it owns; ``flat`` on the leader."""
        geometry, mine = self.engine.geometry, torch.empty(0)
        sends: dict[int, torch.Tensor] = {}
        for peer in geometry.nesting.world if flat is not None else ():
            values = torch.empty(geometry.held(DOMAIN, peer))
            assert flat is not None
            self._each_piece(peer, flat, values, into=True)
            if peer == self._rank:
                mine = values
            elif values.numel():
                sends[peer] = values.view(torch.uint8)
        count = geometry.held(DOMAIN, self._rank)
        wanted = self._rank != LEADER and count
        sizes = {LEADER: 4 * count} if wanted else {}
        received = self._lane.swap("outer_in", sends, sizes).wait()
        if wanted:
            mine = received[LEADER].view(torch.float32)
        at = 0
        for each in owned(self.engine.states, self.engine.owned):
            each.master.copy_(mine[at : at + each.piece.numel])
            at += each.piece.numel
        self.engine.spread_weights()

    def _each_piece(
        self, peer: int, flat: torch.Tensor, values: torch.Tensor, *, into: bool
    ) -> None:
        """Copy what a rank owns from ``flat`` into packed ``values``, or back."""
        at = 0
        for piece in self.engine.geometry.cuts[DOMAIN][peer]:
            begin = self._begins[self.engine.space.names[piece.tensor]] + piece.begin
            whole = flat[begin : begin + piece.numel]
            part = values[at : at + piece.numel]
            (part if into else whole).copy_(whole if into else part)
            at += piece.numel


def _order_untrusted(data: bytes) -> _Order:
    try:
        order: _Order = msgspec.msgpack.decode(data, type=_Order)
    except msgspec.MsgspecError as exc:
        raise IntegrityError(f"order: {exc}", code="E_ORDER") from exc
    return order


def _optimizer(train: TrainSpec) -> AdamW:
    return AdamW(
        learning_rate=train.learning_rate,
        betas=BETAS,
        weight_decay=train.weight_decay,
        grad_clip=train.grad_clip,
    )


def _module(spec: ModelSpec, seed: int) -> nn.Module:
    """Return transformers' Llama with the initial weights that every engine has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict({**llama.config_json(spec), "use_cache": False})
    module: nn.Module = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initial_values(name, shape, seed).view(shape))
    return module


def _loss(module: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    logits = module(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, llama.VOCABULARY), tokens[:, 1:].reshape(-1)
    )


def _tokens(windows: Sequence[bytes]) -> torch.Tensor:
    joined = bytearray(b"".join(windows))
    return torch.frombuffer(joined, dtype=torch.uint8).long().view(len(windows), -1)
