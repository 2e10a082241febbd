"""The time of a schedule on measured links, without running it.

Each message takes its link, and the uplinks of the islands it leaves and enters, one
after the other; it starts when what it sends has begun to arrive and ends no sooner
than that has ended (pieces follow each other). Good to compare algorithms with; the
processor's share is inside the measured rates.
"""

from __future__ import annotations

from collections.abc import Hashable

from training.worker.collectives.links import Links
from training.worker.collectives.schedule import Message, Schedule, Span

MESSAGE_SECONDS = 3e-5
"""Of a processor, for a message of any size."""
SHARING = 0.06
"""Part of its rate that a card loses to several flows: measured, four ranks at 1 Gbit/s
reach 99 % of a ring of gloo as a ring, 92 % each to each, 85 % by doubling."""


class _Arrivals:
    """When spans of one rank's space began and ended to arrive."""

    def __init__(self) -> None:
        self._known: list[tuple[Span, float, float]] = []

    def add(self, span: Span, begun: float, ended: float) -> None:
        self._known = [
            known
            for known in self._known
            if not (span.start <= known[0].start and known[0].stop <= span.stop)
        ]
        self._known.append((span, begun, ended))

    def of(self, span: Span) -> tuple[float, float]:
        touching = [
            (begun, ended)
            for known, begun, ended in self._known
            if known.start < span.stop and span.start < known.stop
        ]
        begun = max((t[0] for t in touching), default=0.0)
        return begun, max((t[1] for t in touching), default=0.0)


def estimate(
    schedule: Schedule, links: Links, itemsize: int, piece_bytes: int
) -> float:
    """Return the seconds until the last message of ``schedule`` has arrived."""
    free: dict[Hashable, float] = {}
    busy_with: dict[Hashable, tuple[int, int]] = {}
    arrivals = [_Arrivals() for _ in range(links.size)]
    last = 0.0
    for steps in schedule:
        # read before written, as in every round
        starts = [
            arrivals[step.source].of(step.span)
            for step in steps
            if isinstance(step, Message)
        ]
        messages = [step for step in steps if isinstance(step, Message)]
        for message, (begun, ended) in zip(messages, starts, strict=True):
            nbytes = message.span.size * itemsize
            first = min(nbytes, piece_bytes)
            used = _resources(links, message)
            latency = links.latency[message.source][message.target]
            lag = first / min(used.values())
            start = max([begun, *(free.get(key, 0.0) for key in used)])
            pair = (message.source, message.target)
            for key, rate in used.items():
                shared = busy_with.get(key, pair) != pair
                busy_with[key] = pair
                took = MESSAGE_SECONDS + nbytes / rate * (1 + shared * SHARING)
                free[key] = start + took
            done = max(max(free[key] for key in used), ended + lag) + latency
            into = Span(message.at, message.at + message.span.size)
            arrivals[message.target].add(into, start + lag + latency, done)
            last = max(last, done)
    return last


def _resources(links: Links, message: Message) -> dict[Hashable, float]:
    source, target = message.source, message.target
    used: dict[Hashable, float] = {
        (source, target): links.bytes_per_second[source][target],
        # a rank's own processor and card move one byte at a time
        ("out", source): max(links.rates_of(source)),
        ("in", target): max(links.rates_to(target)),
    }
    if links.has_islands():
        here, there = links.island(source), links.island(target)
        if here != there:
            used["leaving", here] = links.uplink_bytes_per_second
            used["entering", there] = links.uplink_bytes_per_second
    return used
