"""Tensors end to end as the address space of a schedule."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fabric.core.errors import LocalProtocolError

Combine = Callable[[Tensor, Tensor], object]

_TORCH: dict[str, Combine] = {
    "SUM": lambda a, b: torch.add(a, b, out=a),
    "AVG": lambda a, b: torch.add(a, b, out=a),
    "PREMUL_SUM": lambda a, b: torch.add(a, b, out=a),
    "PRODUCT": lambda a, b: torch.mul(a, b, out=a),
    "MIN": lambda a, b: torch.minimum(a, b, out=a),
    "MAX": lambda a, b: torch.maximum(a, b, out=a),
    "BAND": lambda a, b: torch.bitwise_and(a, b, out=a),
    "BOR": lambda a, b: torch.bitwise_or(a, b, out=a),
    "BXOR": lambda a, b: torch.bitwise_xor(a, b, out=a),
}
# One thread, without OpenMP's pool: the threads of links are many already.
_NUMPY: dict[str, np.ufunc] = {
    "SUM": np.add,
    "AVG": np.add,
    "PREMUL_SUM": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
_FAST = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
}
REDUCE_OPS = frozenset(_TORCH)


class TensorMemory:
    """The elements of ``tensors``, one after the other, from address ``base`` on.

    Args:
        tensors: Contiguous, on the CPU, of one dtype; written in place.
        reduce_op: Name of torch's reduce operation.
        world: What a mean divides by.
        base: Address of the first element.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        reduce_op: str = "SUM",
        world: int = 1,
        base: int = 0,
    ) -> None:
        # as_strided: torch calls one element contiguous whatever its stride
        flats = [t.detach().as_strided((t.numel(),), (1,)) for t in tensors]
        self._dtype = flats[0].dtype if flats else torch.uint8
        if any(t.dtype != self._dtype for t in flats):
            raise LocalProtocolError("tensors of one collective differ in dtype")
        if reduce_op not in REDUCE_OPS:
            raise LocalProtocolError(f"reduce operation {reduce_op} is not supported")
        self.itemsize = self._dtype.itemsize
        self._flats = flats
        self._bytes = [_bytes_of(t) for t in flats]
        self._starts = list(accumulate((t.numel() for t in flats), initial=base))
        self._op = reduce_op
        self._world = world

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes of elements, copied only if they span tensors."""
        parts = self._parts(start, stop)
        if len(parts) == 1:
            return parts[0]
        return memoryview(b"".join(parts))

    def landing(self, start: int, stop: int) -> memoryview | None:
        """Return where bytes may be received straight, if that is in one tensor."""
        parts = self._parts(start, stop)
        return parts[0] if len(parts) == 1 else None

    def write(self, start: int, stop: int, data: memoryview) -> None:
        """Overwrite elements."""
        at = 0
        for part in self._parts(start, stop):
            np.copyto(
                np.frombuffer(part, np.uint8),
                np.frombuffer(data[at : at + len(part)], np.uint8),
            )
            at += len(part)

    def reduce(self, start: int, stop: int, data: memoryview) -> None:
        """Combine elements with ``data``."""
        at = 0
        for part in self._parts(start, stop):
            self._combine(part, data[at : at + len(part)])
            at += len(part)

    def finish(self, start: int, stop: int) -> None:
        """Divide elements by the number of ranks."""
        for part in self._parts(start, stop):
            values = torch.frombuffer(part, dtype=self._dtype)
            if values.dtype.is_floating_point or values.dtype.is_complex:
                values.div_(self._world)
            else:
                values.div_(self._world, rounding_mode="trunc")

    def _combine(self, mine: memoryview, other: memoryview) -> None:
        fast = _FAST.get(self._dtype)
        if fast is not None:
            target = np.frombuffer(mine, fast)
            _NUMPY[self._op](target, np.frombuffer(other, fast), out=target)
            return
        _TORCH[self._op](
            torch.frombuffer(mine, dtype=self._dtype),
            torch.frombuffer(other, dtype=self._dtype),
        )

    def _parts(self, start: int, stop: int) -> list[memoryview]:
        """Return the bytes of elements, tensor by tensor."""
        found = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[number]
            end = min(stop, self._starts[number + 1])
            if end > start:
                size = self.itemsize
                found.append(
                    self._bytes[number][(start - first) * size : (end - first) * size]
                )
                start = end
            number += 1
        return found


def _bytes_of(flat: Tensor) -> memoryview:
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy().data)
