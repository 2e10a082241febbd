"""The table of links: each peer its own record, nonsense skipped."""

import pytest

from crdt_store.link_records import MAX_LINKS, LinkRecord, PublishedLink
from crdt_store.link_views import Links
from crdt_store.slots import Slots
from fabric.core.ids import JobId

JOB = JobId("ab" * 32)
LINK = PublishedLink(rtt_microseconds=30_000, up_bytes_per_second=10**6)


def table(world, signer):
    slots = Slots()

    async def put(key, value, ttl):
        entry = world.entry(signer, key, value, ttl=ttl)
        slots.put(entry)
        return entry

    return slots, Links(slots, put, lambda *tables: tables, signer.peer_id)


async def test_a_record_is_read_back_under_its_author(world):
    author = world.workers[0]
    _, links = table(world, author)
    record = LinkRecord(links={world.workers[1].peer_id: LINK})
    await links.put(JOB, record)
    assert links.get(JOB) == {author.peer_id: record}
    assert links.get(JobId("cd" * 32)) == {}
    assert "l" in links.watch()


async def test_foreign_keys_and_nonsense_do_not_count(world):
    author, other = world.workers[:2]
    slots, links = table(world, author)
    await links.put(JOB, LinkRecord())
    slots.put(world.entry(other, f"l/{JOB}/{author.peer_id}", b"\x81\xa5links\x80"))
    slots.put(world.entry(other, f"l/{JOB}/{other.peer_id}", b"\xc1"))
    assert links.get(JOB) == {author.peer_id: LinkRecord()}


async def test_more_links_than_fit_are_refused(world):
    _, links = table(world, world.workers[0])
    many = {f"peer{number}": LINK for number in range(MAX_LINKS + 1)}
    with pytest.raises(ValueError, match="33 links"):
        await links.put(JOB, LinkRecord(links=many))
    with pytest.raises(ValueError, match="cannot name"):
        await links.put(JobId("a/b"), LinkRecord())
