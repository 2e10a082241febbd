"""A relayed control connection moves to a path that the data plane opens."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.data_config import DataConfig
from fabric.net.data_plane import open_data_plane
from fabric.net.libp2p_host import open_host
from fabric.net.ports import ALLOWED
from fabric.net.traversal_api import ConnectionInfo
from nat.punch.config import PunchConfig
from nat.punch.control_service import ControlPathService

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
pytestmark = pytest.mark.slow


class OpenGate:
    def allows(self, peer, protocol):
        return ALLOWED


class Member:
    def __init__(self, host, plane):
        self.host = host
        self.peer = host.peer_id
        self.direct = set()
        self.service = ControlPathService(
            host, plane, PunchConfig(), lambda: self.direct
        )

    def kinds(self, other):
        return [info.kind for info in self.host.connections(other.peer)]


@asynccontextmanager
async def members():
    """Yield two hosts, the lower id first, whose one connection says it is relayed."""
    signers = sorted(
        (Ed25519Signer.generate() for _ in range(2)), key=lambda s: s.peer_id
    )
    counters, gate = Counters(), OpenGate()
    async with AsyncExitStack() as stack:
        enter, found = stack.enter_async_context, []
        for signer in signers:
            host = await enter(open_host(LOOPBACK, signer, gate, counters))
            plane = await enter(
                open_data_plane(DataConfig(), signer, host, gate, counters)
            )
            found.append(Member(host, plane))
        nursery = await enter(trio.open_nursery())
        one, two = found
        await join(one, two, nursery)
        for member in found:
            await nursery.start(member.service.run)
        with trio.fail_after(20):
            yield one, two
        nursery.cancel_scope.cancel()


async def join(one, two, nursery):
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(10):
        async with trio.open_nursery() as both:
            for host, peer, stream, outbound in (
                (one.host, two.peer, ours, True),
                (two.host, one.peer, theirs, False),
            ):
                info = ConnectionInfo(kind="relay", outbound=outbound)
                both.start_soon(host.adopt, peer, stream, info)


async def until(condition):
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_the_connection_moves_once_rpc_is_direct():
    async with members() as (one, two):
        assert one.kinds(two) == two.kinds(one) == ["relay"]
        one.direct, two.direct = {two.peer}, {one.peer}
        await until(lambda: len(one.kinds(two)) == len(two.kinds(one)) == 2)
        assert one.kinds(two)[0] == two.kinds(one)[0] == "direct"
        two.host.set_handler("/x/1", lambda peer, stream: stream.send_all(b"yes"))
        await one.host.close_connections(two.peer, "relay")
        async with await one.host.open_stream(two.peer, "/x/1") as stream:
            assert await stream.receive_some(3) == b"yes"


async def test_one_side_acts_and_only_where_rpc_needs_no_relay():
    async with members() as (one, two):
        two.direct = {one.peer}  # the higher id waits for the other
        with trio.move_on_after(2.5):
            await until(lambda: len(one.kinds(two)) > 1)
        assert one.kinds(two) == ["relay"]
