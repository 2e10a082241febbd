"""Connections between hosts that break at any byte: callers see our errors only."""

from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio

from fabric.core.errors import FabricError
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS
from fabric.net.data_config import DataConfig
from fabric.net.data_plane import open_data_plane
from fabric.net.rpc import open_rpc
from fabric.net.traversal_api import ConnectionInfo
from tests.net.breaking_proxy import NEVER, breaking_proxy
from tests.net.test_data_plane_hosts import OpenGate
from tests.net.test_libp2p_host import host, port_of

QUICK = {"dial_seconds": 1.0, "upgrade_seconds": 1.0, "negotiate_seconds": 1}
DATA = DataConfig(handshake_timeout_seconds=1.0, max_offers_per_peer=1000)
KINDS = ("reset", "end", "flip")
pytestmark = pytest.mark.slow


class Peer:
    """A host with its data plane and RPC."""

    def __init__(self, host, plane, rpc):
        self.host, self.plane, self.rpc = host, plane, rpc
        self.id = host.peer_id
        rpc.register("x.echo", lambda peer, request: request)

    async def forget(self, other):
        await self.rpc.disconnect(other.id)
        await self.host.disconnect(other.id)


async def open_peer(stack, config):
    enter, signer, gate = (
        stack.enter_async_context,
        Ed25519Signer.generate(),
        OpenGate(),
    )
    opened = await enter(host(signer, **QUICK))
    plane = await enter(open_data_plane(config, signer, opened, gate, opened.counters))
    rpc = await enter(
        open_rpc(config.rpc, signer.peer_id, plane, gate, opened.counters)
    )
    plane.serve_rpc(rpc.accept)
    return Peer(opened, plane, rpc)


async def call_once(one, two, port):
    """Connect from nothing and call; return whether that worked."""
    try:
        with trio.fail_after(10):
            await one.host.connect(two.id, [f"/ip4/127.0.0.1/tcp/{port}"])
            answer = await one.rpc.call(two.id, "x.echo", b"x" * 1000)
    except FabricError:
        return False
    finally:
        await one.forget(two)
        await two.forget(one)
    assert answer == b"x" * 1000
    return True


@pytest.mark.parametrize("plane", ["control", "data"])
async def test_nothing_but_our_errors_wherever_a_connection_breaks(plane):
    async with AsyncExitStack() as stack:
        data = await stack.enter_async_context(breaking_proxy(0))
        through = f"127.0.0.1:{data.port}"
        two = await open_peer(stack, DataConfig(advertise=(through,)))
        one = await open_peer(stack, DATA)
        data.target = two.plane.port
        control = await stack.enter_async_context(breaking_proxy(port_of(two.host)))
        proxy = {"control": control, "data": data}[plane]
        assert await call_once(one, two, control.port)
        length = dict(proxy.counts)
        assert min(length.values()) > 1000
        worked = 0
        for number, kind in enumerate(KINDS):
            for direction in ("forth", "back"):
                # other bytes each time; the handshakes are in the first 700
                for at in (*range(number, 700, 89), 1000, 1400):
                    proxy.fault(direction, at, kind)
                    worked += await call_once(one, two, control.port)
        assert worked < 30  # the faults did happen
        proxy.heal()
        with trio.fail_after(10):
            while not await call_once(one, two, control.port):  # noqa: ASYNC110
                await trio.sleep(0.05)
        for peer in (one, two):
            assert peer.host.counters.snapshot().get(BUGS, 0) == 0


async def adopt(here, there, stream, *, outbound):
    """Return the code of the error, or ""."""
    try:
        info = ConnectionInfo(kind="punched", outbound=outbound)
        await here.adopt(there.peer_id, stream, info)
    except FabricError as exc:
        return exc.code
    return ""


@pytest.mark.parametrize("kind", KINDS)
async def test_an_adopted_stream_breaks_with_our_errors(kind):
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        one, two = await enter(host(**QUICK)), await enter(host(**QUICK))
        nursery = await enter(trio.open_nursery())

        async def serve(stream):
            await adopt(two, one, stream, outbound=False)

        serving = await nursery.start(partial(trio.serve_tcp, serve, 0))
        port = serving[0].socket.getsockname()[1]
        proxy = await enter(breaking_proxy(port))
        codes = set()
        for at in (*range(0, 500, 61), NEVER):
            proxy.fault("back", at, kind)
            stream = await trio.open_tcp_stream("127.0.0.1", proxy.port)
            codes.add(await adopt(one, two, stream, outbound=True))
            await one.disconnect(two.peer_id)
        nursery.cancel_scope.cancel()
    assert codes - {""}
    assert "" in codes
