"""Bytes on the links: what the sockets counted, and what the exchange should take.

The closed form of one round is P = N + 4 ceil(N / block) bytes from each contributor to
each other participant (N parameters, int8 with one fp32 scale per block), and for a
newcomer 8 N bytes of state (parameters and outer momentum in fp32) from its sources
together. Both are taken over the links of the final participants: the last bytes of
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


def expected_bytes(outcome: TrainOutcome, spec: JobSpec, numel: int) -> dict[str, int]:
    """Return the closed form of the rounds for each link of the final participants."""
    payload = numel + 4 * math.ceil(numel / spec.train.outer.block)
    final = final_participants(outcome)
    expected = {f"{a}>{b}": 0 for a in final for b in final if a != b}
    for at, contributors in outcome.contributors:
        members = members_at(outcome, at)
        for one in contributors & final:
            for other in (members & final) - {one}:
                expected[f"{one}>{other}"] += payload
    return expected


def expected_state_bytes(outcome: TrainOutcome, numel: int) -> int:
    """Return the bytes of state that all newcomers fetched."""
    newcomers = final_participants(outcome) - outcome.members[0][1]
    return 8 * numel * len(newcomers)


def final_participants(outcome: TrainOutcome) -> frozenset[str]:
    """Return the short ids of the last generation's participants."""
    assert outcome.row is not None
    return frozenset(short(peer) for peer in outcome.row.participants)


def members_at(outcome: TrainOutcome, at: int) -> frozenset[str]:
    """Return the short ids of the participants of round ``at``."""
    return [peers for start, peers in outcome.members if start <= at][-1]


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
