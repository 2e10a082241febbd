"""Measures the links of a group: pairs ping, then send; disjoint pairs at once.

What comes out is rounded to 10 % steps and the same on every rank: each tells the
others what it measured, and a link counts as its slower direction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from training.worker.backend.process_group import FabricProcessGroup
from training.worker.collectives.links import Links, quantised

PINGS = 4
"""The first opens connections; the best of the others counts."""
PROBE_BYTES = 4 << 20
"""A few times what sockets buffer."""


def measure_links(group: FabricProcessGroup) -> Links:
    """Return the links of ``group``; every member calls it at the same time.

    Raises:
        FabricError: a member is gone.
    """
    size, rank = group.size(), group.rank()
    mine = torch.zeros(size, 2, dtype=torch.float64)
    for pairs in tournament(size):
        for a, b in pairs:
            if rank in (a, b):
                peer = b if rank == a else a
                mine[peer] = torch.tensor(_pair(group, peer, leads=rank == a))
        group.barrier().wait()
    everyone = [torch.zeros_like(mine) for _ in range(size)]
    group.allgather([everyone], [mine]).wait()
    table = torch.stack(everyone)
    return _links(table.tolist())


def tournament(size: int) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs in which everyone meets everyone once."""
    places = list(range(size + size % 2))  # with an odd number, one of them rests
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if max(p) < size])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _pair(group: FabricProcessGroup, peer: int, *, leads: bool) -> tuple[float, float]:
    """Return the latency one way in seconds, and the bytes per second."""
    word, probe = torch.zeros(1, dtype=torch.uint8), torch.zeros(PROBE_BYTES)
    probe = probe.view(torch.uint8)[:PROBE_BYTES]
    trips = [_trip(group, peer, word, leads=leads) for _ in range(PINGS)][1:]
    latency = min(trips) / 2
    _trip(group, peer, probe, leads=leads)
    both = _trip(group, peer, probe, leads=leads)
    return latency, 2 * PROBE_BYTES / max(both - 2 * latency, 1e-6)


def _trip(
    group: FabricProcessGroup, peer: int, tensor: torch.Tensor, *, leads: bool
) -> float:
    started = time.perf_counter()
    if leads:
        group.send([tensor], peer).wait()
        group.recv([tensor], peer).wait()
    else:
        group.recv([tensor], peer).wait()
        group.send([tensor], peer).wait()
    return time.perf_counter() - started


def _links(table: Sequence[Sequence[Sequence[float]]]) -> Links:
    size = len(table)

    def of(a: int, b: int) -> tuple[float, float]:
        if a == b:
            return 0.0, float("inf")
        latency = max(table[a][b][0], table[b][a][0])
        return quantised(latency), quantised(min(table[a][b][1], table[b][a][1]))

    return Links(
        latency=tuple(tuple(of(a, b)[0] for b in range(size)) for a in range(size)),
        bytes_per_second=tuple(
            tuple(of(a, b)[1] for b in range(size)) for a in range(size)
        ),
        group=tuple(range(size)),
    )
