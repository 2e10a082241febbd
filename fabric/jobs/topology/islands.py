"""Islands within islands: where the links of a job's members change by a leap.

A cluster of the dendrogram is an island when the cluster it joins next is at least
three times as far apart. One that was an island before stays one down to twice, so
noise between the two moves nothing. No number of levels is given: each leap makes one.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec

from crdt_store.link_records import LinkRecord
from fabric.core.ids import PeerId
from fabric.jobs.topology.dendrogram import Join, dendrogram
from fabric.jobs.topology.distances import Link, Links, factor, log2_fixed, merge

MAKE = log2_fixed(3)
"""Leap that makes a new island: a factor of 3."""
KEEP = log2_fixed(2)
"""Leap below which an island is given up: a factor of 2."""
SITE_RTT_MICROSECONDS = 5000
"""Longer round trips are called the internet; a name only, no cut depends on it."""


class Span(msgspec.Struct, frozen=True):
    """The links between some peers: medians of the pairs that were measured.

    Attributes:
        bytes_per_second: Of each pair's slower direction.
        rtt_seconds: Round trip.
        measured: Pairs that were measured.
        pairs: Pairs in all.
        disputed: Pairs whose ends contradict each other.
    """

    bytes_per_second: float = 0.0
    rtt_seconds: float = 0.0
    measured: int = 0
    pairs: int = 0
    disputed: int = 0


class Island(msgspec.Struct, frozen=True):
    """Peers that are nearer to each other than to anybody else, or one peer.

    Attributes:
        members: In the order of their ids.
        level: 0 for a single peer, else one above its highest child.
        kind: "peer", "host", "site", "internet" or "unmeasured".
        inside: The links between its children.
        outside: The links to the rest of the island around it.
        leap: How many times farther the next cluster is; 0: everybody is in it, or
            nothing joins it to the others.
        children: The islands within, in the order of their first members.
    """

    members: tuple[PeerId, ...]
    level: int = 0
    kind: str = "peer"
    inside: Span = Span()
    outside: Span = Span()
    leap: float = 0.0
    children: tuple[Island, ...] = ()

    def walk(self) -> Iterator[Island]:
        """Yield this island and those within, outer ones first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def at(self, level: int) -> tuple[Island, ...]:
        """Return the largest islands of at most ``level``; together all members."""
        if self.level <= level:
            return (self,)
        return tuple(island for child in self.children for island in child.at(level))


class Topology(msgspec.Struct, frozen=True):
    """All members of a job as one island, and the links it was found from."""

    root: Island
    links: dict[tuple[PeerId, PeerId], Link]

    @property
    def cuts(self) -> frozenset[frozenset[PeerId]]:
        """Return the islands that a cut parts from others."""
        found = (each for each in self.root.walk() if each is not self.root)
        return frozenset(frozenset(each.members) for each in found if each.level)


def topology_of(
    records: Mapping[PeerId, LinkRecord],
    members: Iterable[PeerId],
    before: Collection[frozenset[PeerId]] = (),
    hosts: Mapping[PeerId, str] | None = None,
) -> Topology:
    """Return the islands of ``members``: equal on all who hold the same ``records``.

    Args:
        records: Published links by author.
        members: Of the job; at least one.
        before: :attr:`Topology.cuts` in force, which noise shall not move. Peers that
            agree on it agree on the result.
        hosts: Where a member runs, if known; it names islands and cuts none.
    """
    order, links = merge(records, members)
    survey = _Survey(order, links, before, hosts or {})
    return Topology(survey.island(dendrogram(order, links)), links)


class _Survey:
    def __init__(
        self,
        order: Iterable[PeerId],
        links: Links,
        before: Collection[frozenset[PeerId]],
        hosts: Mapping[PeerId, str],
    ) -> None:
        self._links = links
        # of islands whose members came or went, the others stay what they were
        self._known = frozenset[PeerId]().union(*before) & frozenset(order)
        self._before = {cut & self._known for cut in before}
        self._hosts = hosts

    def island(
        self, join: Join, around: Iterable[PeerId] = (), leap: float = 0.0
    ) -> Island:
        """Return the island of ``join`` within the members ``around``."""
        if not join.parts:
            return Island(join.members)
        inner = [(part, self._leap(part, above)) for part, above in self._parts(join)]
        inner.sort(key=lambda pair: pair[0].members)
        children = tuple(self.island(part, join.members, gap) for part, gap in inner)
        within = self._span(
            (one, other)
            for index, child in enumerate(children)
            for beside in children[index + 1 :]
            for one in child.members
            for other in beside.members
        )
        mine = frozenset(join.members)
        beyond = [peer for peer in around if peer not in mine]
        return Island(
            join.members,
            1 + max(child.level for child in children),
            self._kind(join.members, within),
            within,
            self._span((one, other) for one in join.members for other in beyond),
            leap,
            children,
        )

    def _parts(self, join: Join) -> Iterator[tuple[Join, Join]]:
        """Yield what is parted within ``join``, each with the cluster it joins."""
        pending = [(part, join) for part in join.parts]
        while pending:
            part, above = pending.pop()
            if not part.parts or self._is_cut(part, above):
                yield part, above
            else:
                pending += [(inner, part) for inner in part.parts]

    def _is_cut(self, part: Join, above: Join) -> bool:
        if above.height is None or part.height is None:
            return True
        known = frozenset(part.members) & self._known
        enough = KEEP if known in self._before else MAKE
        return above.height - part.height >= enough

    def _leap(self, part: Join, above: Join) -> float:
        if above.height is None or part.height is None:
            return 0.0
        return factor(round(above.height - part.height))

    def _span(self, pairs: Iterable[tuple[PeerId, PeerId]]) -> Span:
        num_pairs, found = 0, []
        for one, other in pairs:
            num_pairs += 1
            link = self._links.get((one, other) if one < other else (other, one))
            if link is not None and link.is_measured:
                found.append(link)
        if not found:
            return Span(pairs=num_pairs)
        return Span(
            statistics.median(link.slower for link in found),
            statistics.median(link.rtt_microseconds for link in found) / 1e6,
            len(found),
            num_pairs,
            sum(link.is_disputed for link in found),
        )

    def _kind(self, members: tuple[PeerId, ...], within: Span) -> str:
        if not within.measured:
            return "unmeasured"
        if within.rtt_seconds * 1e6 > SITE_RTT_MICROSECONDS:
            return "internet"
        hosts = {self._hosts.get(peer, peer) for peer in members}
        return "host" if len(hosts) == 1 else "site"
