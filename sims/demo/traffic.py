"""Bytes on the links: what the sockets counted, and what the exchange should take.

The closed form of one round is P = N + 4 ceil(N / block) bytes from each contributor to
each other participant (N parameters, int8 with one fp32 scale per block), and of a
newcomer 8 N bytes of state (parameters and outer momentum in fp32) from all sources
together. It is summed over the links between the final participants: the last bytes of
a peer that was killed were counted by a process that is gone.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from fabric.app.control_messages import JobRow
from fabric.core.ids import short
from fabric.jobs.runner import LINK_FACT
from fabric.jobs.spec import JobSpec
from sims.demo.train_step import TrainOutcome


def measured_bytes(row: JobRow) -> dict[str, int]:
    """Return the bytes of each link, "from>to", as the data plane's sockets counted."""
    return {
        name.removeprefix(LINK_FACT): int(value)
        for name, value in row.facts.items()
        if name.startswith(LINK_FACT) and ">" in name
    }


def expected_bytes(
    outcome: TrainOutcome, spec: JobSpec, export: Path
) -> dict[str, int]:
    """Return the closed form for each link between the final participants."""
    assert outcome.row is not None
    numel = num_parameters(export / "model.safetensors")
    payload = numel + 4 * math.ceil(numel / spec.train.outer.block)
    final = sorted(short(peer) for peer in outcome.row.participants)
    together = rounds_together(outcome, spec.train.outer.rounds)
    expected = {
        f"{one}>{other}": payload * together.get(frozenset((one, other)), 0)
        for one in final
        for other in final
        if one != other
    }
    first = outcome.members[0][1]
    for newcomer in set(final) - first:
        sources = [peer for peer in final if peer != newcomer]
        for source in sources:
            expected[f"{source}>{newcomer}"] += 8 * numel // len(sources)
    return expected


def rounds_together(outcome: TrainOutcome, rounds: int) -> dict[frozenset[str], int]:
    """Return in how many rounds each pair of peers took part together."""
    counts: dict[frozenset[str], int] = {}
    ends = [start for start, _ in outcome.members[1:]] + [rounds]
    for (start, members), end in zip(outcome.members, ends, strict=True):
        for one in members:
            for other in members - {one}:
                pair = frozenset((one, other))
                # each pair is met twice, once from either end
                counts[pair] = counts.get(pair, 0) + (end - start)
    return {pair: count // 2 for pair, count in counts.items()}


def num_parameters(path: Path) -> int:
    """Return the number of values in a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(
        math.prod(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    )
