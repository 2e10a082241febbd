"""From the arrivals of a burst to a link's bandwidth, and to its published steps."""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence

from fabric.net.ports import LinkMeasurement

Arrival = tuple[float, int]
"""Seconds, and bytes received so far."""

WARM_UP_PART = 0.25
"""Discarded: slow start, and the tokens a shaper had saved up."""
TAIL_PART = 0.1
NUM_WINDOWS = 6
"""Parts of a burst whose rates agree when it is stable."""
STABLE_BYTES = 512 << 10
"""With less, a burst is never called stable."""
STABLE_SPREAD = 0.1
_TICK_SECONDS = 1e-6
STEP = 1.1
"""Published values are powers of this: 10 % steps."""
HYSTERESIS_STEPS = 1.0
"""A value must leave its step by this before the next is published."""
MIN_RTT_SECONDS = 0.001
"""Below this a round trip is scheduling noise, and nobody cares."""


def windows(arrivals: Sequence[Arrival]) -> list[float]:
    """Return the rates of about equal parts of a burst, without its warm-up."""
    if not arrivals:
        return []
    counts = [count for _, count in arrivals]
    warm = counts[-1] * WARM_UP_PART
    part = (counts[-1] - warm) / NUM_WINDOWS
    at = {
        bisect_left(counts, warm + part * number) for number in range(NUM_WINDOWS + 1)
    }
    marks = [arrivals[index] for index in sorted(at) if index < len(arrivals)]
    return [
        (after[1] - before[1]) / (after[0] - before[0])
        for before, after in itertools.pairwise(marks)
        if after[0] - before[0] > _TICK_SECONDS
    ]


def estimate(arrivals: Sequence[Arrival]) -> float:
    """Return bytes per second of a burst; 0 when too little arrived to tell.

    The mean between warm-up and tail: a lost packet holds back what follows, which
    then comes at once, so that rates of short parts say little; and a loss among the
    last packets is noticed by a timer only.
    """
    if not arrivals:
        return 0.0
    counts = [count for _, count in arrivals]
    start = arrivals[bisect_left(counts, counts[-1] * WARM_UP_PART)]
    end = arrivals[bisect_left(counts, counts[-1] * (1 - TAIL_PART))]
    seconds = end[0] - start[0]
    return (end[1] - start[1]) / seconds if seconds > _TICK_SECONDS else 0.0


def is_stable(arrivals: Sequence[Arrival]) -> bool:
    """Return whether more of the burst would not change the estimate."""
    if not arrivals or arrivals[-1][1] < STABLE_BYTES:
        return False
    rates = sorted(windows(arrivals))
    if len(rates) < NUM_WINDOWS:
        return False
    middle = rates[1:-1]
    return middle[-1] - middle[0] <= STABLE_SPREAD * statistics.median(rates)


def quantise(value: float, before: float = 0.0) -> float:
    """Return the nearest step to ``value``; 0 stays 0.

    Args:
        value: Measured, in any unit.
        before: The step published so far, kept while ``value`` stays near it.
    """
    if value <= 0:
        return 0.0
    exact = math.log(value, STEP)
    if before > 0 and abs(exact - math.log(before, STEP)) <= HYSTERESIS_STEPS:
        return before
    return float(STEP ** round(exact))


def quantise_link(
    link: LinkMeasurement, before: LinkMeasurement | None
) -> LinkMeasurement:
    """Return ``link`` in steps; equal to ``before`` while no step changed."""
    known = before or LinkMeasurement(rtt_seconds=0.0)
    steps = LinkMeasurement(
        rtt_seconds=quantise(max(link.rtt_seconds, MIN_RTT_SECONDS), known.rtt_seconds),
        up_bytes_per_second=quantise(
            link.up_bytes_per_second, known.up_bytes_per_second
        ),
        down_bytes_per_second=quantise(
            link.down_bytes_per_second, known.down_bytes_per_second
        ),
        path=link.path,
    )
    return before if before is not None and steps == before else steps


def is_urgent(link: LinkMeasurement, before: LinkMeasurement | None) -> bool:
    """Return whether others should learn of the change soon: by half or more."""
    if before is None or link.path != before.path:
        return True
    pairs = (
        (link.up_bytes_per_second, before.up_bytes_per_second),
        (link.down_bytes_per_second, before.down_bytes_per_second),
        (max(link.rtt_seconds, MIN_RTT_SECONDS), before.rtt_seconds),
    )
    return any(max(pair) > 2 * min(pair) for pair in pairs)
