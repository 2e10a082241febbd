"""Links of our jobs are measured and published; a refused write stops nothing."""

import trio

from fabric.app.links import LOOK_SECONDS, publish_links
from fabric.core.errors import ResourceExhausted
from fabric.net.ports import LinkMeasurement
from nat.probe.config import ProbeConfig


class Source:
    def __init__(self):
        self.members = frozenset()
        self.known = {}

    def set_members(self, members, near):
        self.members, self.near = members, near

    def links(self):
        return {peer: link for peer, link in self.known.items() if peer in self.members}


class Table:
    def __init__(self):
        self.written = []
        self.full = False

    async def put(self, job, record):
        if self.full:
            raise ResourceExhausted("the disk is full")
        self.written.append((job, record))
        await trio.lowlevel.checkpoint()


async def test_each_job_gets_the_links_to_its_members(autojump_clock):
    source, table, jobs = Source(), Table(), {"one": {"a", "b"}, "two": {"b"}}
    link = LinkMeasurement(rtt_seconds=0.02, up_bytes_per_second=1e6)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            publish_links, source, table, lambda: jobs, ProbeConfig(), lambda: {"b"}
        )
        await trio.sleep(1)
        assert (source.members, source.near) == ({"a", "b"}, {"b"})
        assert table.written == []
        source.known = {"a": link, "b": link, "c": link}
        table.full = True
        await trio.sleep(LOOK_SECONDS)
        table.full = False
        await trio.sleep(70)
        written = dict(table.written)
        assert set(written["one"].links) == {"a", "b"}
        assert set(written["two"].links) == {"b"}
        jobs.clear()
        table.written.clear()
        await trio.sleep(10 * 3600)
        assert source.members == frozenset()
        assert table.written == []
        nursery.cancel_scope.cancel()
