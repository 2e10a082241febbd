"""From the islands of a job's members to the ground of a plan."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import msgspec

from fabric.core.ids import PeerId, short
from fabric.jobs.plan.ground import UNSHARED, Ground, Place, Rank
from fabric.jobs.topology.distances import Links
from fabric.jobs.topology.islands import Island, Topology
from fabric.jobs.topology.reasons import reasons

UNMEASURED = 1e6
"""Bytes per second assumed where nobody measured: slow enough not to be chosen."""
UNMEASURED_RTT = 0.1
HOST_BYTES_PER_SECOND = 2e9
"""Between ranks of one peer, where nothing better is known: memory to memory."""
OUTWARD = 0.75
"""Of a place's measured ways out, those at this quantile tell its own limit: a slow
other end tells its own."""


class PeerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a member brings.

    Attributes:
        name: For people; empty: the end of its id.
        memory_bytes: Of each rank; 0: not known.
        flops: Of each rank, as training reaches them.
        ranks: Worker processes.
        host_bytes_per_second: In and out of each of them, to the others.
    """

    name: str = ""
    memory_bytes: int = 0
    flops: float = 1e11
    ranks: int = 1
    host_bytes_per_second: float = HOST_BYTES_PER_SECOND


def ground_of(topology: Topology, facts: Mapping[PeerId, PeerFacts]) -> Ground:
    """Return the ground that ``topology`` and its members' ``facts`` make."""
    builder = _Builder(topology.links, facts)
    root = builder.place(topology.root, UNSHARED, UNSHARED, 0.0)
    kinds = [builder.kinds.get(level + 1, ["?"]) for level in range(root.level)]
    return Ground(
        root=root,
        ranks=tuple(builder.ranks),
        levels=tuple("/".join(dict.fromkeys(names)) for names in kinds),
        reasons=reasons(topology, builder.name),
    )


class _Builder:
    def __init__(self, links: Links, facts: Mapping[PeerId, PeerFacts]) -> None:
        self._links = links
        self._facts = facts
        self.ranks: list[Rank] = []
        self.kinds: dict[int, list[str]] = {}

    def name(self, peer: PeerId) -> str:
        """Return what people call ``peer``."""
        return self._fact(peer).name or short(peer)

    def _fact(self, peer: PeerId) -> PeerFacts:
        return self._facts.get(peer, PeerFacts())

    def place(self, island: Island, up: float, down: float, rtt: float) -> Place:
        """Return the place of ``island``; its ranks get the next numbers."""
        start = len(self.ranks)
        if not island.children:
            return self._peer(island.members[0], up, down, rtt)
        children = tuple(
            self.place(child, *self._way_out(child, island))
            for child in island.children
        )
        level = 1 + max(child.level for child in children)
        self.kinds.setdefault(level, []).append(island.kind)
        name = self.name(island.members[0])
        more = len(island.members) - 1
        return Place(
            name=f"{name}+{more}",
            level=level,
            start=start,
            stop=len(self.ranks),
            up=up,
            down=down,
            rtt_seconds=rtt,
            children=children,
        )

    def _peer(self, peer: PeerId, up: float, down: float, rtt: float) -> Place:
        fact, name, start = self._fact(peer), self.name(peer), len(self.ranks)
        names = [f"{name}/{n}" for n in range(fact.ranks)] if fact.ranks > 1 else [name]
        self.ranks += [
            Rank(
                name=each,
                peer=peer,
                memory_bytes=fact.memory_bytes,
                flops=fact.flops,
            )
            for each in names
        ]
        if fact.ranks <= 1:
            return Place(
                name=name,
                level=0,
                start=start,
                stop=start + 1,
                up=up,
                down=down,
                rtt_seconds=rtt,
            )
        self.kinds.setdefault(1, []).append("host")
        rate = fact.host_bytes_per_second
        children = tuple(
            Place(
                name=each,
                level=0,
                start=start + number,
                stop=start + number + 1,
                up=rate,
                down=rate,
            )
            for number, each in enumerate(names)
        )
        return Place(
            name=name,
            level=1,
            start=start,
            stop=len(self.ranks),
            up=up,
            down=down,
            rtt_seconds=rtt,
            children=children,
        )

    def _way_out(self, island: Island, around: Island) -> tuple[float, float, float]:
        """Return bytes per second out of and into ``island``, and the round trip."""
        ups, downs, rtts = [], [], []
        for beside in around.children:
            if beside is not island:
                up, down, rtt = self._between(island.members, beside.members)
                ups.append(up)
                downs.append(down)
                rtts.append(rtt)
        return (
            _quantile([rate for rate in ups if rate]) or UNMEASURED,
            _quantile([rate for rate in downs if rate]) or UNMEASURED,
            max((rtt for rtt in rtts if rtt), default=UNMEASURED_RTT),
        )

    def _between(
        self, here: Iterable[PeerId], there: tuple[PeerId, ...]
    ) -> tuple[float, float, float]:
        """Return medians of the links from ``here`` to ``there``; 0: not measured."""
        ups, downs, rtts = [], [], []
        for one in here:
            for other in there:
                pair = (one, other) if one < other else (other, one)
                link = self._links.get(pair)
                if link is not None and link.is_measured:
                    forth, back = link.there, link.back
                    up, down = (forth, back) if one < other else (back, forth)
                    ups.append(up or down)
                    downs.append(down or up)
                    rtts.append(link.rtt_microseconds / 1e6)
        if not rtts:
            return 0.0, 0.0, 0.0
        return statistics.median(ups), statistics.median(downs), statistics.median(rtts)


def _quantile(rates: list[float]) -> float:
    ordered = sorted(rates)
    return ordered[int(OUTWARD * (len(ordered) - 1))] if ordered else 0.0
