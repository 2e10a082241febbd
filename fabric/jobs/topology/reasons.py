"""Why the islands are cut where they are, in sentences for people."""

from __future__ import annotations

from collections.abc import Callable

from fabric.core.ids import PeerId, short
from fabric.jobs.topology.islands import Island, Span, Topology

MAX_NAMES = 4
Name = Callable[[PeerId], str]


def reasons(topology: Topology, name: Name = short) -> tuple[str, ...]:
    """Return a sentence for each cut, outermost first, then what is not known."""
    root = topology.root
    lines = [
        _cut(island, name)
        for island in root.walk()
        if island.level and island is not root
    ]
    if not lines:
        lines = [_uncut(root, name)]
    alone = [
        island
        for each in root.walk()
        if each.kind == "unmeasured"
        for island in each.children
    ]
    lines += [
        f"{_names(island, name)}: no link to the others was measured yet; placed apart"
        for island in alone
    ]
    disputed = sum(link.is_disputed for link in topology.links.values())
    if disputed:
        lines.append(
            f"{disputed} pairs say more than twofold different things of their link; "
            "the worse counts"
        )
    return tuple(lines)


def _cut(island: Island, name: Name) -> str:
    if not island.leap:
        return f"{_names(island, name)} stay together: {_rate(island.inside)} inside"
    return (
        f"{_names(island, name)} stay together: {_rate(island.inside)} inside, "
        f"{_rate(island.outside)} to the rest, a leap of {island.leap:.1f}"
    )


def _uncut(root: Island, name: Name) -> str:
    if root.level == 0:
        return f"{_names(root, name)} is alone"
    rate, count = _rate(root.inside), len(root.members)
    return f"no cut: {rate} between all {count}, and no leap of 3"


def _names(island: Island, name: Name) -> str:
    shown = [name(peer) for peer in island.members[:MAX_NAMES]]
    more = len(island.members) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _rate(span: Span) -> str:
    if not span.measured:
        return "not measured"
    mbit = span.bytes_per_second * 8 / 1e6
    rate = f"{mbit / 1000:.3g} Gbit/s" if mbit >= 1000 else f"{mbit:.3g} Mbit/s"
    return f"{rate} and {span.rtt_seconds * 1e3:.3g} ms"
