"""What the daemon says of members and links to somebody who plans a job."""

from __future__ import annotations

import msgspec

from crdt_store.link_records import LinkRecord


class PlanLinks(msgspec.Struct, frozen=True, tag="plan_links"):
    """Return the members of a job, or who could take part, and their measured links.

    Attributes:
        job: A job's id or its beginning; empty: the members that are there.
        max_peers: As many members at most, in the order of their ids.
        measure: Have links that nobody knows measured now.
    """

    job: str = ""
    max_peers: int = 64
    measure: bool = False


class PlanMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member that takes part, or could.

    Attributes:
        memory_bytes: Of its machine, as it says.
        cpus: Of its machine, as it says.
        host: Members of one machine show one host.
    """

    peer: str
    name: str
    memory_bytes: int = 0
    cpus: int = 1
    host: str = ""


class PlanLinksView(msgspec.Struct, frozen=True, kw_only=True):
    """Who would train, over which links; ``records`` as their authors published."""

    members: tuple[PlanMember, ...]
    records: dict[str, LinkRecord]
    unasked: tuple[str, ...] = ()
    """Members that could not be asked to measure, each with why."""
