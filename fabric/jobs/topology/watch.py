"""When a changed topology is worth acting on: once it has stood for a while.

Peers publish one after the other, so a link that breaks shows first in one record and
a minute later in the last. Acting on each would rebuild islands several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from crdt_store.link_records import LinkRecord
from fabric.core.ids import PeerId
from fabric.jobs.topology.islands import Topology, topology_of

QUIET_SECONDS = 120.0
"""Twice the time within which every peer publishes a change by half."""


class TopologyWatch:
    """The topology in force of one job, as its coordinator holds it.

    Args:
        quiet_seconds: A new one must stand unchanged for this long.
    """

    def __init__(self, quiet_seconds: float = QUIET_SECONDS) -> None:
        self._quiet = quiet_seconds
        self._since = 0.0
        self._next: frozenset[frozenset[PeerId]] | None = None
        self.topology: Topology | None = None

    def look(
        self,
        records: Mapping[PeerId, LinkRecord],
        members: Iterable[PeerId],
        now: float,
    ) -> bool:
        """Take in the links; return whether the islands in force changed.

        Who came or went counts at once: a generation starts with it anyway.
        """
        members = frozenset(members)
        known = self.topology
        cuts = known.cuts if known is not None else frozenset()
        found = topology_of(records, members, cuts)
        if known is None or frozenset(known.root.members) != members:
            return self._take(found)
        if found.cuts == cuts:
            self.topology, self._next = found, None  # newer numbers, the same islands
            return False
        if found.cuts != self._next:
            self._next, self._since = found.cuts, now
        return now - self._since >= self._quiet and self._take(found)

    def _take(self, found: Topology) -> bool:
        self.topology, self._next = found, None
        return True
