from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamEOF
from multiaddr import Multiaddr

from fabric.core.ids import PeerId
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.host import PeerDisconnected
from fabric.net.libp2p_host import open_host
from tests.net.check_host import ListGate, echo, receive_all

ECHO = "/fabric/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
pytestmark = pytest.mark.slow


@asynccontextmanager
async def connected_pair(**settings):
    config = HostConfig(listen=(LOOPBACK,), **settings)
    one, two = (
        open_host(config, Ed25519Signer.generate(), ListGate(), Counters())
        for _ in "12"
    )
    async with one as first, two as second:
        await first.connect(second.peer_id, second.addrs())
        with trio.fail_after(10):
            yield first, second


class Stalling:
    """A handler that reads only when told."""

    def __init__(self):
        self.go_on = trio.Event()
        self.got = 0

    async def __call__(self, peer, stream):
        await self.go_on.wait()
        async for part in stream:
            self.got += len(part)
        await stream.send_all(b"all")


async def test_a_stalled_reader_holds_up_its_stream_and_nothing_else():
    reader = Stalling()
    async with connected_pair(stall_seconds=60) as (one, two):
        two.set_handler("/fabric/slow/1", reader)
        two.set_handler(ECHO, echo)
        slow = await one.open_stream(two.peer_id, "/fabric/slow/1")
        sent = trio.Event()

        async def send():
            await slow.send_all(bytes(4 << 20))
            await slow.send_eof()
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            for _ in range(20):  # the others go on meanwhile
                async with await one.open_stream(two.peer_id, ECHO) as other:
                    await other.send_all(b"quick")
                    assert await other.receive_some() == b"quick"
            assert not sent.is_set()
            reader.go_on.set()
        assert await receive_all(slow) == b"all"
        assert reader.got == 4 << 20


async def test_a_reader_that_stalls_beyond_the_limit_loses_its_stream_only():
    reader = Stalling()
    async with connected_pair(stall_seconds=0.2) as (one, two):
        two.set_handler("/fabric/slow/1", reader)
        two.set_handler(ECHO, echo)
        slow = await one.open_stream(two.peer_id, "/fabric/slow/1")
        with pytest.raises(trio.BrokenResourceError, match="read nothing for"):
            await slow.send_all(bytes(4 << 20))
        async with await one.open_stream(two.peer_id, ECHO) as other:
            await other.send_all(b"alive")
            assert await other.receive_some() == b"alive"
        reader.go_on.set()


class FreezingProxy:
    """Forwards one connection until told to swallow everything."""

    def __init__(self, port):
        self._port = port
        self.frozen = False

    async def serve(self, client):
        server = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, client, server)
            nursery.start_soon(self._carry, server, client)

    async def _carry(self, source, sink):
        async for data in source:
            if self.frozen:
                await trio.sleep_forever()
            await sink.send_all(data)


async def test_a_writer_to_a_dead_peer_is_freed_and_the_connection_ends():
    config = HostConfig(
        listen=(LOOPBACK,), keepalive_seconds=0.2, dead_after_seconds=0.2
    )
    one = open_host(config, Ed25519Signer.generate(), ListGate(), Counters())
    two = open_host(config, Ed25519Signer.generate(), ListGate(), Counters())
    async with one as first, two as second, trio.open_nursery() as nursery:
        second.set_handler("/fabric/slow/1", Stalling())
        proxy = FreezingProxy(int(second.addrs()[0].split("/")[4]))
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
        port = listener.socket.getsockname()[1]
        events = first.events()
        await first.connect(second.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"])
        stream = await first.open_stream(second.peer_id, "/fabric/slow/1")
        assert (await events.receive()).peer == second.peer_id
        with trio.move_on_after(0.5) as quiet:  # pings are answered: it stays
            await events.receive()
        assert quiet.cancelled_caught
        proxy.frozen = True
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(4 << 20))
        with trio.fail_after(5):
            event = await events.receive()
        assert isinstance(event, PeerDisconnected)
        assert "silent" in event.reason
        nursery.cancel_scope.cancel()


async def test_a_doubted_connection_answers_or_ends_and_streams_avoid_it():
    config = HostConfig(listen=(LOOPBACK,))
    one = open_host(config, Ed25519Signer.generate(), ListGate(), Counters())
    two = open_host(config, Ed25519Signer.generate(), ListGate(), Counters())
    async with one as first, two as second, trio.open_nursery() as nursery:
        first.set_handler(ECHO, echo)
        second.set_handler(ECHO, echo)
        proxy = FreezingProxy(int(second.addrs()[0].split("/")[4]))
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
        port = listener.socket.getsockname()[1]
        await first.connect(second.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"])
        with trio.fail_after(10):
            first.doubt()
            (connection,) = first.links.of(second.peer_id)
            while connection.muxed_conn.pulse.in_doubt:  # noqa: ASYNC110  no event
                await trio.sleep(0.01)
            assert len(first.connections(second.peer_id)) == 1, "it answered"
            proxy.frozen = True
            # the first does not know yet; the second has lost it and dials anew
            await second.close_connections(first.peer_id, "direct")
            await second.connect(first.peer_id, first.addrs())
            while len(first.connections(second.peer_id)) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
            async with await first.open_stream(second.peer_id, ECHO) as stream:
                await stream.send_all(b"on the new one")
                assert await stream.receive_some() == b"on the new one"
            while len(first.connections(second.peer_id)) > 1:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_cancelling_a_writer_leaves_the_stream_usable_for_reset():
    async with connected_pair() as (one, two):
        two.set_handler("/fabric/slow/1", Stalling())
        stream = await one.open_stream(two.peer_id, "/fabric/slow/1")
        with trio.move_on_after(0.05) as scope:
            await stream.send_all(bytes(4 << 20))
        assert scope.cancelled_caught
        await trio.aclose_forcefully(stream)
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")


async def test_it_speaks_with_the_stock_stack_both_ways():
    stock = new_host(listen_addrs=[Multiaddr(LOOPBACK)])

    async def stock_echo(stream):
        parts = b""
        while len(parts) < 300_000:
            parts += await stream.read(65536)
        await stream.write(parts)
        await stream.close()

    stock.set_stream_handler(TProtocol("/fabric/stock/1"), stock_echo)
    config = HostConfig(listen=(LOOPBACK,))
    blob = bytes(range(250)) * 1200
    async with stock.run(listen_addrs=[Multiaddr(LOOPBACK)]):
        theirs = PeerId(str(stock.get_id()))
        async with open_host(
            config, Ed25519Signer.generate(), ListGate(), Counters()
        ) as ours:
            ours.set_handler(ECHO, echo)
            with trio.fail_after(10):
                await ours.connect(theirs, [str(a) for a in stock.get_addrs()])
                async with await ours.open_stream(theirs, "/fabric/stock/1") as stream:
                    await stream.send_all(blob)
                    assert await receive_all(stream) == blob
                back = await stock.new_stream(
                    stock.get_connected_peers()[0], [TProtocol(ECHO)]
                )
                await back.write(b"hello")
                assert await back.read(5) == b"hello"
                await back.close()
                with pytest.raises(StreamEOF):
                    await back.read(1)
        await stock.close()
