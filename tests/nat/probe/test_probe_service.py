"""Probes between two real data planes: both learn, and nobody can ask for more."""

import random
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from fabric.core.errors import Unavailable
from fabric.net.pacing import PeerTraffic
from nat.probe.config import ProbeConfig
from nat.probe.service import LinkSenses, open_link_probe
from tests.net.test_data_plane import A, B, network, until

pytestmark = pytest.mark.slow


class NoPaths:
    def kind(self, peer):
        return "punched"


@asynccontextmanager
async def probes(config=ProbeConfig()):  # noqa: B008 - frozen
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(network())
        for peer, node in nodes.items():
            node.traffic = {}
            senses = LinkSenses(node.rpc, NoPaths(), lambda node=node: node.traffic)
            node.probe = await stack.enter_async_context(
                open_link_probe(
                    config, peer, node.bulk, senses, node.counters, random.Random(1)
                )
            )
        yield nodes


async def test_one_probe_tells_both_ends():
    async with probes() as nodes:
        nodes[A].probe.set_members([A, B])
        nodes[B].probe.set_members([A, B])
        link = await nodes[A].probe.measure(B)
        assert link.up_bytes_per_second > 1e6
        assert link.down_bytes_per_second > 1e6
        assert link.path == "punched"
        await until(lambda: nodes[B].probe.link(A) is not None)
        theirs = nodes[B].probe.link(A)
        assert theirs.down_bytes_per_second == pytest.approx(
            link.up_bytes_per_second, abs=1
        )
        # fresh: answered from memory, at both ends
        assert await nodes[A].probe.measure(B) == link
        assert await nodes[B].probe.measure(A) == theirs


async def test_members_are_probed_without_being_asked_for():
    async with probes(ProbeConfig(retry_seconds=0.1)) as nodes:
        nodes[A].probe.set_members([B])
        await until(lambda: nodes[A].probe.link(B) is not None)
        assert nodes[A].probe.links().keys() == {B}


async def test_who_asks_again_too_soon_is_refused_by_the_other_end():
    async with probes(ProbeConfig(max_age_seconds=0.0)) as nodes:
        await nodes[A].probe.measure(B)
        with pytest.raises(Unavailable) as refused:
            await nodes[A].probe.measure(B)
        assert refused.value.code == "E_BUSY"
        assert nodes[B].counters.snapshot()["refusals_total:E_BUSY"] == 1


async def test_a_busy_link_is_not_probed():
    async with probes() as nodes:
        nodes[A].probe.set_members([B])
        nodes[A].traffic[B] = PeerTraffic(
            up_bytes_per_second=3e6, down_bytes_per_second=1e3, connections={}
        )
        link = await nodes[A].probe.measure(B)
        assert link.up_bytes_per_second == 3e6
        assert nodes[B].probe.links() == {}


async def test_malformed_probes_are_counted_and_end():
    async with probes() as nodes:
        sock = await nodes[A].bulk.dial_bulk(B, "probe")
        with sock:
            await trio.to_thread.run_sync(sock.sendall, b"x" * 12)
            await until(
                lambda: nodes[B].counters.snapshot().get("protocol_errors_total:probe")
            )


async def test_a_second_connection_at_once_gets_no_thread_for_long():
    async with probes() as nodes:
        first = await nodes[A].bulk.dial_bulk(B, "probe")
        await until(lambda: nodes[B].probe._served == {A})
        second = await nodes[A].bulk.dial_bulk(B, "probe")
        with first, second:
            assert await trio.to_thread.run_sync(second.recv, 1) == b""
