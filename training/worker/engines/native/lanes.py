"""Exchanges between ranks, each byte counted, over any torch.distributed groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fabric.core.errors import Unavailable
from training.sharding import DOMAIN, GROUP, ISLAND, WORLD, Nesting, Ranks
from training.sharding_bytes import Flow


class Ledger:
    """Counts what this rank sends, by operation and receiver."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.sent: Counter[Flow] = Counter()

    def add(self, operation: str, target: int, size: int) -> None:
        """Count ``size`` bytes."""
        self.sent[Flow(operation, self._rank, target)] += size

    def by_operation(self) -> dict[str, int]:
        """Return the bytes of each operation."""
        sums: Counter[str] = Counter()
        for flow, size in self.sent.items():
            sums[flow.operation] += size
        return dict(sums)

    def by_level(self, levels: Sequence[Sequence[Ranks]]) -> list[int]:
        """Return the bytes whose two ranks first share a part at each level.

        Args:
            levels: Parts of the world, from the innermost links outwards. The last
                counts what shares no part before it.
        """
        sums = [0] * len(levels)
        for flow, size in self.sent.items():
            ends = {flow.source, flow.target}
            shared = (
                number
                for number, parts in enumerate(levels)
                if any(ends <= set(part) for part in parts)
            )
            sums[next(shared, len(levels) - 1)] += size
        return sums


class Groups:
    """The process groups of one rank. Making them is a collective call of all ranks.

    Args:
        nesting: Which sets of ranks need one.
        known: Groups made before, by their ranks; new ones are added.
    """

    def __init__(
        self, nesting: Nesting, known: dict[Ranks, dist.ProcessGroup] | None = None
    ) -> None:
        self.rank = dist.get_rank()
        self._nesting = nesting
        self._made = known if known is not None else {}
        for level in (ISLAND, GROUP, DOMAIN, WORLD):
            for part in nesting.parts(level):
                if part not in self._made:  # every rank makes each, in this order
                    with as_unavailable():
                        self._made[part] = dist.new_group(list(part))

    def of(self, level: int) -> dist.ProcessGroup:
        """Return the group of our part of a level."""
        return self._made[self._nesting.part(level, self.rank)]


class Pending:
    """An exchange in flight."""

    def __init__(
        self,
        work: dist.Work | None,
        received: torch.Tensor,
        sizes: Mapping[int, int],
        kept: object,
    ) -> None:
        self._work, self._received = work, received
        self._sizes, self._kept = sizes, kept

    def wait(self) -> dict[int, torch.Tensor]:
        """Return the bytes from each peer.

        Raises:
            Unavailable: a peer is gone or too late.
        """
        if self._work is not None:
            with as_unavailable():
                self._work.wait()
        self._work = self._kept = None
        sizes = list(self._sizes.values())
        return dict(zip(self._sizes, self._received.split(sizes), strict=True))


class Lane:
    """One group, of which each member sends bytes to each other.

    Args:
        group: The process group.
        members: Its ranks, sorted as it numbers them.
        ledger: Counts what we send.
        idle: Nobody has anything to send: no exchange takes place.
    """

    def __init__(
        self, group: dist.ProcessGroup, members: Ranks, ledger: Ledger, *, idle: bool
    ) -> None:
        self._group, self._ledger, self._idle = group, ledger, idle
        self._members = sorted(members)

    def swap(
        self,
        operation: str,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, int],
    ) -> Pending:
        """Send (bytes,) uint8 to peers, and receive; all members call, in one order.

        Args:
            operation: For the ledger.
            sends: By peer.
            receives: Bytes that come from each peer; it has the same number.
        """
        peers = [peer for peer in self._members if receives.get(peer)]
        sizes = {peer: receives[peer] for peer in peers}
        received = torch.empty(sum(sizes.values()), dtype=torch.uint8)
        if self._idle:
            return Pending(None, received, sizes, None)
        parts = [sends[peer] for peer in self._members if peer in sends]
        packed = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        for peer, part in sends.items():
            self._ledger.add(operation, peer, part.numel())
        out = [sends[p].numel() if p in sends else 0 for p in self._members]
        into = [receives.get(p, 0) for p in self._members]
        with as_unavailable():
            work = dist.all_to_all_single(
                received, packed, into, out, group=self._group, async_op=True
            )
        return Pending(work, received, sizes, packed)


@contextmanager
def as_unavailable() -> Iterator[None]:
    """Turn what torch.distributed raises when a peer fails into our error."""
    try:
        yield
    except RuntimeError as exc:
        raise Unavailable(
            f"collective failed: {str(exc)[:300]}",
            code="E_COLLECTIVE",
            next_step="see which rank ended, and start again from the last checkpoint",
        ) from exc
