"""How the ranks of a save or load talk: bytes, bounded, never pickle.

An error on one rank is an outcome like any other, so that no rank waits for one that
has given up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, NamedTuple, Protocol

import msgspec
import torch
import torch.distributed as dist

from fabric.core import errors
from fabric.core.codec import Codec
from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    ResourceExhausted,
    Unavailable,
)

MAX_MESSAGE_BYTES = 128 << 20
"""Largest message of one rank: a plan, or the record of what it wrote."""
FRAME_BYTES = 512
"""What small messages travel in: a digest, a refusal."""
TIMEOUT_SECONDS = 1800.0
"""A rank that says nothing for so long is lost; a large file takes minutes to write."""


_SIZE = struct.Struct("<Q")


class Parcel(NamedTuple):
    """A tensor for or from another rank; its number is the same on both.

    Attributes:
        rank: The other rank.
        number: Unique among the parcels of one swap.
        data: Contiguous, on the CPU.
    """

    rank: int
    number: int
    data: torch.Tensor


class Exchange(Protocol):
    """A group of ranks. All call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Our place, from 0."""
        ...

    @property
    def world(self) -> int:
        """Number of ranks."""
        ...

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return everyone's bytes, by rank."""
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """Return everyone's bytes on rank 0, nothing elsewhere."""
        ...

    def scatter(self, data: Sequence[bytes]) -> bytes:
        """Return what rank 0 gives us; others pass nothing."""
        ...

    def swap(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Send and fill tensors; every send has its receive on the other rank."""
        ...


class LocalExchange:
    """A group of one."""

    rank = 0
    world = 1

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return our bytes."""
        return [data]

    def gather(self, data: bytes) -> list[bytes]:
        """Return our bytes."""
        return [data]

    def scatter(self, data: Sequence[bytes]) -> bytes:
        """Return our bytes."""
        return data[0]

    def swap(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Do nothing: there is no other rank."""


class TorchExchange:
    """A group over torch.distributed, of its own, so that it may run in a thread.

    Making one is a collective call: every rank of the default group makes it.

    Args:
        ranks: Global ranks of the group; None = all.
        timeout_seconds: After this a silent rank is an error.
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        with _typed():
            self.group = dist.new_group(
                None if ranks is None else list(ranks),
                timeout=timedelta(seconds=timeout_seconds),
                backend="gloo",
            )
        self.rank = dist.get_rank(self.group)
        self.world = dist.get_world_size(self.group)

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return everyone's bytes, by rank."""
        with _typed():
            frames = self._frames(data)
            sizes = [int(_SIZE.unpack_from(frame)[0]) for frame in frames]
            if max(sizes) <= FRAME_BYTES - _SIZE.size:  # one exchange, not two
                begin = _SIZE.size
                return [
                    frame[begin : begin + size]
                    for frame, size in zip(frames, sizes, strict=True)
                ]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(data)] = _tensor(data)
            found = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(found, padded, group=self.group)
        return [_bytes(t[:size]) for t, size in zip(found, sizes, strict=True)]

    def gather(self, data: bytes) -> list[bytes]:
        """Return everyone's bytes on rank 0, nothing elsewhere."""
        with _typed():
            sizes = self._sizes(data)
            if self.rank:
                dist.send(_tensor(data), group=self.group, group_dst=0)
                return []
            found = [data]
            for source, size in enumerate(sizes[1:], start=1):
                buffer = torch.empty(size, dtype=torch.uint8)
                dist.recv(buffer, group=self.group, group_src=source)
                found.append(_bytes(buffer))
        return found

    def scatter(self, data: Sequence[bytes]) -> bytes:
        """Return what rank 0 gives us; others pass nothing."""
        with _typed():
            sizes = torch.tensor([len(each) for each in data] or [0] * self.world)
            dist.broadcast(sizes, group=self.group, group_src=0)
            if self.rank == 0:
                for target, each in enumerate(data[1:], start=1):
                    dist.send(_tensor(each), group=self.group, group_dst=target)
                return data[0]
            buffer = torch.empty(int(sizes[self.rank]), dtype=torch.uint8)
            dist.recv(buffer, group=self.group, group_src=0)
        return _bytes(buffer)

    def swap(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Send and fill tensors; every send has its receive on the other rank."""
        with _typed():
            works = [
                dist.irecv(p.data, group=self.group, group_src=p.rank, tag=p.number)
                for p in receives
            ]
            works += [
                dist.isend(p.data, group=self.group, group_dst=p.rank, tag=p.number)
                for p in sends
            ]
            for work in works:
                if work is not None:
                    work.wait()

    def _sizes(self, data: bytes) -> list[int]:
        return [int(_SIZE.unpack_from(frame)[0]) for frame in self._frames(data)]

    def _frames(self, data: bytes) -> list[bytes]:
        """Return everyone's number of bytes and as many as fit beside it."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise ResourceExhausted(f"message of {len(data)} B > {MAX_MESSAGE_BYTES} B")
        frame = _SIZE.pack(len(data)) + data[: FRAME_BYTES - _SIZE.size]
        mine = _tensor(frame.ljust(FRAME_BYTES, b"\0"))
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine, group=self.group)
        return [_bytes(each) for each in found]


def default_exchange() -> Exchange:
    """Return a group of all ranks if torch.distributed is initialised, else of one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchExchange()
    return LocalExchange()


class Outcome(msgspec.Struct, frozen=True):
    """What a rank's work came to: ``body``, or the error that ``kind`` names."""

    kind: Annotated[str, msgspec.Meta(max_length=40)] = ""
    code: Annotated[str, msgspec.Meta(max_length=80)] = ""
    reason: Annotated[str, msgspec.Meta(max_length=4000)] = ""
    next_step: Annotated[str, msgspec.Meta(max_length=4000)] = ""
    body: bytes = b""


OUTCOME_CODEC: Codec[Outcome] = Codec(Outcome, max_bytes=MAX_MESSAGE_BYTES)


def done(body: bytes = b"") -> bytes:
    """Return the outcome of work that succeeded."""
    return OUTCOME_CODEC.encode(Outcome(body=body))


def failed(error: FabricError) -> bytes:
    """Return the outcome of work that failed."""
    return OUTCOME_CODEC.encode(
        Outcome(
            _public_kind(error),
            error.code,
            error.reason[:3000],
            error.next_step[:3000],
        )
    )


def _public_kind(error: FabricError) -> str:
    """Return the class that says who must act; a package's own derive from it."""
    kinds = (kind.__name__ for kind in type(error).__mro__)
    return next(kind for kind in kinds if hasattr(errors, kind))


def bodies(outcomes: Sequence[bytes]) -> list[bytes]:
    """Return what all ranks' work came to.

    Raises:
        FabricError: the first failure, as the rank that failed raised it.
    """
    found = [OUTCOME_CODEC.decode_untrusted(each) for each in outcomes]
    for rank, outcome in enumerate(found):
        if outcome.kind:
            raise _error(rank, outcome, alone=len(found) == 1)
    return [outcome.body for outcome in found]


def _error(rank: int, outcome: Outcome, *, alone: bool) -> FabricError:
    kind = getattr(errors, outcome.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, FabricError)):
        kind = LocalProtocolError
    reason = outcome.reason if alone else f"rank {rank}: {outcome.reason}"
    found: FabricError = kind(reason, code=outcome.code, next_step=outcome.next_step)
    return found


def as_fabric_error(error: Exception) -> FabricError:
    """Return ``error`` if it is ours, else one that carries its text."""
    if isinstance(error, FabricError):
        return error
    if isinstance(error, MemoryError):
        return ResourceExhausted("no memory to stage the checkpoint", code="E_MEMORY")
    return LocalProtocolError(f"{type(error).__name__}: {error}")


@contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:  # what gloo raises: closed connections, timeouts
        raise Unavailable(
            f"a rank does not answer: {str(exc)[:300]}",
            code="E_RANK_LOST",
            next_step="start again from the last committed step",
        ) from exc


def _tensor(data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
