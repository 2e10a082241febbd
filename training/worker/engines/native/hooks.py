"""The exchanges inside an island, under FSDP2: weights gathered, gradients scattered.

FSDP2 calls these in place of its own collectives. Gathering may quantise blocks of
weights (ZeRO++ qwZ); every rank then uses the same decoded values, its own included.
Scattering sends each rank its chunk of the gradients and sums in fp32, in the order of
ranks (qgZ in one hop). It only *starts* the exchange: FSDP2 goes on with the backward
pass, and the sum is taken when the unit's flow is moved on (see
:mod:`training.worker.engines.native.pipeline`). What FSDP2 sees as the output is not
filled, and nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from typing_extensions import override

from training.sharding_bytes import Form
from training.worker.engines.native.codec import QUANTISED, decode, encode
from training.worker.engines.native.lanes import Lane, Ledger, Pending, as_unavailable


class WeightGather(AllGather):
    """Gathers a unit's weights from the ranks of the group.

    Args:
        form: Quantised, or anything else for the weights' own type.
        block: Elements with one scale.
        ledger: Counts what we send: our shard, to each other rank.
    """

    def __init__(self, form: Form, block: int, ledger: Ledger) -> None:
        self._form, self._block, self._ledger = form, block, ledger

    @override
    def allocate(
        self,
        size: Sequence[int | torch.SymInt],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @override
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        quantised = self._form in QUANTISED
        sent, into = input_tensor, output_tensor
        if quantised:
            sent = encode(input_tensor.float(), self._form, self._block)
            into = torch.empty(group.size() * sent.numel(), dtype=torch.uint8)
        for peer in dist.get_process_group_ranks(group):
            if peer != dist.get_rank():
                size = sent.numel() * sent.element_size()
                self._ledger.add("gather_w", peer, size)
        with as_unavailable():
            work = dist.all_gather_single(into, sent, group=group, async_op=True)
        assert work is not None

        def finish() -> None:
            if quantised:
                self._decode(into, output_tensor, group.size())

        later = _Later(work, finish, sent)
        if async_op:
            return later
        later.wait()
        return None

    def _decode(self, data: torch.Tensor, output: torch.Tensor, parts: int) -> None:
        for coded, part in zip(data.chunk(parts), output.chunk(parts), strict=True):
            part.copy_(decode(coded, part.numel(), self._form, self._block))


class _Later(dist.Work):
    """A gather that is decoded when it is waited for."""

    def __init__(
        self, work: dist.Work, finish: Callable[[], None], kept: torch.Tensor
    ) -> None:
        super().__init__()
        self._work, self._finish, self._kept = work, finish, kept

    @override
    def wait(self, timeout: timedelta | None = None) -> bool:
        with as_unavailable():
            self._work.wait()
        self._finish()
        self._finish = _nothing
        return True


def _nothing() -> None:
    pass


class GradientScatter(ReduceScatter):
    """Starts the sum of a unit's gradients over the island.

    Args:
        lane: The island.
        members: Its ranks, in the order of the shards.
        rank: Ours.
        form: How chunks travel.
        block: Elements with one scale.
    """

    def __init__(
        self, lane: Lane, members: Sequence[int], rank: int, form: Form, block: int
    ) -> None:
        self._lane, self._members, self._rank = lane, list(members), rank
        self._form, self._block = form, block
        self._started: tuple[Pending, torch.Tensor] | None = None

    @override
    def allocate(
        self,
        size: Sequence[int | torch.SymInt],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @override
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        chunks = dict(
            zip(self._members, input_tensor.chunk(len(self._members)), strict=True)
        )
        own = chunks.pop(self._rank).clone()
        sends = {
            peer: encode(chunk, self._form, self._block)
            for peer, chunk in chunks.items()
        }
        sizes = {peer: part.numel() for peer, part in sends.items()}
        self._started = (self._lane.swap("reduce_w", sends, sizes), own)
        return None

    def finish(self) -> Callable[[], torch.Tensor]:
        """Return what waits for the exchange that was just started and sums."""
        started, self._started = self._started, None
        assert started is not None
        pending, own = started

        def total() -> torch.Tensor:
            received = pending.wait()
            size, result = own.numel(), torch.zeros_like(own)
            for peer in self._members:
                if peer == self._rank:
                    result.add_(own)
                else:
                    part = decode(received[peer], size, self._form, self._block)
                    result.add_(part)
            return result

        return total
