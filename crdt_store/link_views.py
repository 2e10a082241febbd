"""The typed table of measured links.

l/<job>/<peer>  LinkRecord  its own: its links to members of the job
"""

from __future__ import annotations

from crdt_store.link_records import MAX_LINKS, LinkRecord
from crdt_store.views import Values, View, segment
from fabric.core.ids import JobId, PeerId

LINK_TTL_SECONDS = 86400
"""A job's members refresh their links while it runs; afterwards they fade."""

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
