"""From a call of torch to a job of the engine: which schedule, on which memory.

Every function returns a job's three parts: the label that all ranks must agree on, what
prepares it in the group's thread, and what puts the result in place. Inputs that a
schedule would overwrite are copied first, in that thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from training.worker.backend.memory import TensorMemory
from training.worker.collectives.choose import CHOICES_KEPT, Chooser
from training.worker.collectives.direct import all_to_all_program, dissemination
from training.worker.collectives.engine import Prepared
from training.worker.collectives.hazards import Waits, waits_of
from training.worker.collectives.schedule import Program, Schedule, program, spans_of


def nothing() -> None:
    """The result is in place."""


@dataclass(frozen=True)
class Request:
    """A job without its future."""

    label: str
    prepare: Callable[[], Prepared]
    finish: Callable[[], None] = nothing


class Requests:
    """Makes the requests of one rank in one group."""

    def __init__(self, rank: int, chooser: Chooser) -> None:
        self.rank = rank
        self.size = chooser.links.size
        self._chooser = chooser
        self._ours = lru_cache(CHOICES_KEPT)(self._own_part)
        self._barrier = dissemination(range(self.size))

    def all_reduce(self, tensors: Sequence[Tensor], op: str, factor: float) -> Request:
        """Combine ``tensors`` of all ranks, in place."""
        work = [_flat(t) for t in tensors]
        total, kind = _total(work), work[0].dtype

        def prepare() -> Prepared:
            if op == "PREMUL_SUM":
                for t in work:
                    t.mul_(factor)
            schedule = self._chooser.all_reduce(total, kind.itemsize, mean=op == "AVG")
            return self._prepared(schedule, TensorMemory(work, op, self.size))

        label = f"all_reduce {op} of {total} {kind}"
        return Request(label, prepare, _put_back(work, tensors))

    def all_gather(self, outputs: Sequence[Tensor], own: Tensor) -> Request:
        """Put what each rank has into ``outputs``, by rank."""
        work = [_flat(t) for t in outputs]
        sizes = tuple(t.numel() for t in work)

        def prepare() -> Prepared:
            work[self.rank].copy_(own.detach().reshape(-1))
            schedule = self._chooser.all_gather(sizes, own.element_size())
            return self._prepared(schedule, TensorMemory(work))

        label = f"all_gather of {sizes} {own.dtype}"
        return Request(label, prepare, _put_back(work, outputs))

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: str, factor: float
    ) -> Request:
        """Combine ``inputs[i]`` of all ranks at rank i."""
        sizes = tuple(t.numel() for t in inputs)
        spans = spans_of(sizes)
        room: list[Tensor] = []

        def prepare() -> Prepared:
            scratch = torch.cat([t.detach().reshape(-1) for t in inputs])
            if op == "PREMUL_SUM":
                scratch.mul_(factor)
            room.append(scratch)
            schedule = self._chooser.reduce_scatter(
                sizes, output.element_size(), mean=op == "AVG"
            )
            return self._prepared(schedule, TensorMemory(room, op, self.size))

        def finish() -> None:
            own = spans[self.rank]
            output.detach().copy_(room.pop()[own.start : own.stop].view(output.shape))

        label = f"reduce_scatter {op} of {sizes} {output.dtype}"
        return Request(label, prepare, finish)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> Request:
        """Overwrite ``tensors`` with those of ``root``."""
        work = [_flat(t) for t in tensors]
        total, kind = _total(work), work[0].dtype

        def prepare() -> Prepared:
            schedule = self._chooser.broadcast(root, total, kind.itemsize)
            return self._prepared(schedule, TensorMemory(work))

        label = f"broadcast from {root} of {total} {kind}"
        done = nothing if root == self.rank else _put_back(work, tensors)
        return Request(label, prepare, done)

    def reduce(
        self, tensors: Sequence[Tensor], root: int, op: str, factor: float
    ) -> Request:
        """Combine ``tensors`` at ``root``; elsewhere they stay what they are."""
        ours = root == self.rank
        work = [_flat(t) if ours else t.detach().reshape(-1) for t in tensors]
        total, kind = _total(work), work[0].dtype

        def prepare() -> Prepared:
            room = work if ours else [t.clone() for t in work]
            if op == "PREMUL_SUM":
                for t in room:
                    t.mul_(factor)
            schedule = self._chooser.reduce(
                root, total, kind.itemsize, mean=op == "AVG"
            )
            return self._prepared(schedule, TensorMemory(room, op, self.size))

        label = f"reduce {op} to {root} of {total} {kind}"
        return Request(label, prepare, _put_back(work, tensors) if ours else nothing)

    def gather(self, outputs: Sequence[Tensor], own: Tensor, root: int) -> Request:
        """Put what each rank has into ``outputs`` of ``root``."""
        sizes = (own.numel(),) * self.size
        work = [_flat(t) for t in outputs]

        def prepare() -> Prepared:
            schedule = self._chooser.gather(root, sizes, own.element_size())
            mine = own.detach().reshape(-1)
            if root == self.rank:
                work[root].copy_(mine)
                return self._prepared(schedule, TensorMemory(work))
            return self._in_extent(schedule, sizes, mine)

        label = f"gather at {root} of {sizes[0]} {own.dtype}"
        return Request(label, prepare, _put_back(work, outputs))

    def scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> Request:
        """Put ``inputs[i]`` of ``root`` into the output of rank i."""
        sizes = (output.numel(),) * self.size
        own = spans_of(sizes)[self.rank]
        memory: list[TensorMemory] = []

        def prepare() -> Prepared:
            schedule = self._chooser.scatter(root, sizes, output.element_size())
            if root == self.rank:
                work = [t.detach().contiguous() for t in inputs]
                return self._prepared(schedule, TensorMemory(work))
            room = torch.empty(own.size, dtype=output.dtype)
            prepared = self._in_extent(schedule, sizes, room)
            assert isinstance(prepared.memory, TensorMemory)
            memory.append(prepared.memory)
            return prepared

        def finish() -> None:
            if root == self.rank:
                output.detach().copy_(inputs[root])
            elif own.size:
                data = memory.pop().read(own.start, own.stop)
                arrived = torch.frombuffer(data, dtype=output.dtype)
                output.detach().copy_(arrived.view(output.shape))

        return Request(
            f"scatter from {root} of {sizes[0]} {output.dtype}", prepare, finish
        )

    def all_to_all(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Request:
        """Put ``inputs[j]`` of rank i into ``outputs[i]`` of rank j."""
        work = [_flat(t) for t in outputs]
        given = tuple(t.numel() for t in inputs)
        taken = tuple(t.numel() for t in outputs)

        def prepare() -> Prepared:
            sent = [t.detach().contiguous() for t in inputs]
            work[self.rank].copy_(sent[self.rank].view(-1))
            ours, waits = self._all_to_all_part(given, taken)
            return Prepared(ours, TensorMemory([*sent, *work]), waits)

        label = f"all_to_all of {work[0].dtype if work else 'nothing'}"
        return Request(label, prepare, _put_back(work, outputs))

    def barrier(self) -> Request:
        """Wait for everyone."""

        def prepare() -> Prepared:
            room = torch.zeros(len(self._barrier) + 1, dtype=torch.uint8)
            return self._prepared(self._barrier, TensorMemory([room]))

        return Request("barrier", prepare)

    # -- programs -----------------------------------------------------------------

    def _prepared(self, schedule: Schedule, memory: TensorMemory) -> Prepared:
        ours, waits = self._ours(schedule)
        return Prepared(ours, memory, waits)

    def _own_part(self, schedule: Schedule) -> tuple[Program, Waits]:
        ours = program(schedule, self.rank)
        return ours, waits_of(ours)

    def _all_to_all_part(
        self, given: tuple[int, ...], taken: tuple[int, ...]
    ) -> tuple[Program, Waits]:
        ours = all_to_all_program(self.rank, given, taken)
        return ours, waits_of(ours)

    def _in_extent(
        self, schedule: Schedule, sizes: tuple[int, ...], mine: Tensor
    ) -> Prepared:
        """Prepare with room for what passes through this rank and no more."""
        ours, waits = self._ours(schedule)
        own = spans_of(sizes)[self.rank]
        first = min([own.start, *(op.span.start for op in ours)])
        last = max([own.stop, *(op.span.stop for op in ours)])
        room = torch.empty(last - first, dtype=mine.dtype)
        room[own.start - first : own.stop - first] = mine
        return Prepared(ours, TensorMemory([room], base=first), waits)


def _flat(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as a line: itself where it lies so, else a copy."""
    return tensor.detach().contiguous().view(-1)


def _total(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _put_back(work: Sequence[Tensor], tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return what copies back the tensors that were not lines."""
    copied = [
        (w, t.detach())
        for w, t in zip(work, tensors, strict=True)
        if w.data_ptr() != t.data_ptr()
    ]

    def put_back() -> None:
        for line, tensor in copied:
            tensor.copy_(line.view(tensor.shape))

    return put_back if copied else nothing
