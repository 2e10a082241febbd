"""The typed table of measured links.

l/<job>/<peer>  LinkRecord  its own: its links to members of the job
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from crdt_store.views import Count, Values, View, segment
from fabric.core.ids import JobId, PeerId

LINK_TTL_SECONDS = 86400
"""A job's members refresh their links while it runs; afterwards they fade."""
MAX_LINKS = 32
"""Of one record: it must fit a slot of 4 KiB (about 90 B each)."""


class PublishedLink(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One link as its one end measured it, in steps of 10 %.

    Attributes:
        rtt_microseconds: Round trip.
        up_bytes_per_second: From the author to the peer; 0 when not measured.
        down_bytes_per_second: From the peer to the author; 0 when not measured.
        path: What carried it.
    """

    rtt_microseconds: Count
    up_bytes_per_second: Count = 0
    down_bytes_per_second: Count = 0
    path: Literal["direct", "punched", "relay"] = "direct"


class LinkRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A peer's links to members of one job."""

    links: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=64)], PublishedLink],
        msgspec.Meta(max_length=MAX_LINKS),
    ] = {}


_RECORD: Values[LinkRecord] = Values(LinkRecord)


class Links(View):
    """Measured links by job and author. A hint: an author may lie about its own."""

    table = "l"

    async def put(self, job: JobId, record: LinkRecord) -> None:
        """Publish our links in ``job``.

        Raises:
            ValueError: more than :data:`MAX_LINKS`, or no job id.
        """
        if len(record.links) > MAX_LINKS:
            raise ValueError(f"{len(record.links)} links, at most {MAX_LINKS} fit")
        key = f"l/{segment(job)}/{self._me}"
        await self._put(key, _RECORD.encode(record), LINK_TTL_SECONDS)

    def get(self, job: JobId) -> dict[PeerId, LinkRecord]:
        """Return the record of each member that is there.

        Somebody else's slot for it does not count.
        """
        found: dict[PeerId, LinkRecord] = {}
        for entry in self._slots.under(f"l/{segment(job)}/"):
            record = _RECORD.read(entry)
            own = entry.key.endswith(f"/{entry.peer}")
            if record is not None and own and not self.absence(entry.peer):
                found[entry.peer] = record
        return found
