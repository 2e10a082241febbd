"""Connections over streams that traversal brought, with real hosts on loopback."""

import socket
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from fabric.core.errors import IntegrityError, NoRoute, RemoteRefused, Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS, Counters
from fabric.net.config import HostConfig
from fabric.net.host import PeerConnected, PeerDisconnected, PeerReconnected
from fabric.net.libp2p_host import open_host
from fabric.net.traversal_api import ConnectionInfo
from tests.net.check_host import ListGate, bindings, echo

ECHO = "/fabric/echo/1"
FOREIGN = "/libp2p/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
CIRCUIT_ADDR = "/ip4/127.0.0.1/tcp/4/p2p/R/p2p-circuit"
SECONDS = 10
pytestmark = pytest.mark.slow


@asynccontextmanager
async def host(gate=None, **settings):
    async with open_host(
        HostConfig(listen=(LOOPBACK,), **settings),
        Ed25519Signer.generate(),
        gate or ListGate(),
        Counters(),
    ) as opened:
        yield opened
        assert opened.counters.snapshot().get(BUGS, 0) == 0


@asynccontextmanager
async def two_hosts(**settings):
    async with host(**settings) as one, host(**settings) as two:
        with trio.fail_after(2 * SECONDS):
            yield one, two


def stream_of(sock):
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def socketpair():
    left, right = socket.socketpair()
    return stream_of(left), stream_of(right)


async def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return stream_of(left), stream_of(right)


def info(kind="punched", *, outbound, relay=None):
    return ConnectionInfo(kind=kind, outbound=outbound, relay=relay)


async def adopt_both(one, two, streams, kind="punched"):
    left, right = streams
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.adopt, two.peer_id, left, info(kind, outbound=True))
        nursery.start_soon(two.adopt, one.peer_id, right, info(kind, outbound=False))


async def says(opener, peer, protocol=ECHO):
    async with await opener.open_stream(peer, protocol) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


async def until(true):
    with trio.fail_after(SECONDS):
        while not true():
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("over", ["socketpair", "tcp"])
async def test_a_stream_becomes_a_connection_with_either_role(over):
    async with two_hosts() as (one, two):
        streams = socketpair() if over == "socketpair" else await tcp_pair()
        await adopt_both(one, two, streams)
        for here, there in ((one, two), (two, one)):
            here.set_handler(ECHO, echo)
            await says(there, here.peer_id)
            assert here.connected() == {there.peer_id}
        assert one.connections(two.peer_id) == (info(outbound=True),)
        assert two.connections(one.peer_id) == (info(outbound=False),)
        mine, theirs = await bindings(one, two)
        assert mine == theirs
        await one.disconnect(two.peer_id)
        await until(lambda: not two.connected())


async def test_a_dialled_connection_knows_its_socket():
    async with two_hosts() as (one, two):
        await one.connect(two.peer_id, two.addrs())
        await until(lambda: two.connected())
        (ours,), (theirs,) = one.connections(two.peer_id), two.connections(one.peer_id)
        assert (ours.kind, ours.outbound, ours.relay) == ("direct", True, None)
        assert (theirs.kind, theirs.outbound) == ("direct", False)
        assert (ours.local, ours.remote) == (theirs.remote, theirs.local)
        assert ours.remote.startswith("127.0.0.1:")


@pytest.mark.parametrize("outbound", [True, False])
async def test_another_peer_than_expected_is_an_integrity_error(outbound):
    stranger = Ed25519Signer.generate().peer_id
    async with two_hosts() as (one, two):
        events = one.events()
        left, right = socketpair()

        async def other_side():
            with suppress(Unavailable):
                await two.adopt(one.peer_id, right, info(outbound=not outbound))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_side)
            with pytest.raises(IntegrityError) as error:
                await one.adopt(stranger, left, info(outbound=outbound))
        assert error.value.code == "E_WRONG_PEER"
        assert one.connected() == frozenset()
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()
        with pytest.raises(trio.ClosedResourceError):
            await left.send_all(b"x")
        await until(lambda: not two.connected())


@pytest.mark.parametrize("outbound", [True, False])
@pytest.mark.parametrize(
    "garbage", [b"", b"\x00" * 4096, b"\xff" * 70_000, b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_garbage_is_unavailable_and_closes_the_stream(outbound, garbage):
    async with host() as one:
        left, right = socketpair()
        peer = Ed25519Signer.generate().peer_id

        async def send():
            try:
                await right.send_all(garbage)
                await right.send_eof()
            except trio.BrokenResourceError:
                pass  # closed before it was all said

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with trio.fail_after(SECONDS), pytest.raises(Unavailable):
                await one.adopt(peer, left, info(outbound=outbound))
        assert one.connected() == frozenset()
        await right.aclose()


@pytest.mark.parametrize("outbound", [True, False])
async def test_silence_ends_at_the_limit(outbound):
    async with host(upgrade_seconds=0.3) as one:
        left, right = socketpair()
        with trio.fail_after(SECONDS), pytest.raises(Unavailable) as error:
            await one.adopt(
                Ed25519Signer.generate().peer_id, left, info(outbound=outbound)
            )
        assert error.value.code == "E_TIMEOUT"
        while await right.receive_some():
            pass  # and then the end: the stream was closed
        await right.aclose()


async def test_cancelled_at_each_message_it_leaves_nothing():
    """Cut the handshake after ever more bytes; no connection, no open socket."""
    async with two_hosts() as (one, two):
        for limit in (0, 1, 40, 60, 140, 300, 420, 500):
            left, right = socketpair()
            cut = trio.Event()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        relay_until, right, two, one.peer_id, limit, cut, scope
                    )
                    await one.adopt(two.peer_id, left, info(outbound=True))
            assert cut.is_set()
            await until(lambda: not one.connected() and not two.connected())
            await until(lambda sock=left.socket: sock.fileno() == -1)


async def relay_until(stream, other, peer, limit, cut, scope):
    """Let ``limit`` bytes pass from the first to ``other``, then cancel ``scope``."""
    near, far = socketpair()

    async def back():
        async for data in near:
            await stream.send_all(data)

    async def answer():
        with suppress(Unavailable):
            await other.adopt(peer, far, info(outbound=False))

    passed = 0
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(back)
            nursery.start_soon(answer)
            while passed < limit:
                data = await stream.receive_some(limit - passed)
                passed += len(data)
                await near.send_all(data)
            cut.set()
            scope.cancel()
    finally:
        for each in (near, far, stream):
            each.socket.close()  # without waiting: the scope is cancelled


def kinds(host, other):
    return [each.kind for each in host.connections(other.peer_id)]


async def test_streams_open_on_the_best_connection_and_stay():
    async with two_hosts() as (one, two):
        two.set_handler(ECHO, echo)
        events = one.events()
        await adopt_both(one, two, socketpair(), "relay")
        staying = await one.open_stream(two.peer_id, ECHO)
        await adopt_both(one, two, socketpair(), "punched")
        await adopt_both(one, two, socketpair(), "relay")
        # those before the newest are better once they have shown that they are alive
        await until(lambda: kinds(one, two) == ["punched", "relay", "relay"])
        await says(one, two.peer_id)
        await staying.send_all(b"still")  # on the relay that it was opened on
        assert await staying.receive_some() == b"still"
        await one.close_connections(two.peer_id, "relay")
        with pytest.raises(trio.BrokenResourceError):
            await staying.receive_some()
        assert [each.kind for each in one.connections(two.peer_id)] == ["punched"]
        await says(one, two.peer_id)
        assert await events.receive() == PeerConnected(two.peer_id)
        for _ in range(2):  # the others may be dead: that is all that two more tell
            assert await events.receive() == PeerReconnected(two.peer_id)
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()
        await one.close_connections(two.peer_id, "punched")
        left = await events.receive()
        assert isinstance(left, PeerDisconnected)
        assert one.connections(two.peer_id) == ()
        await until(lambda: not two.connected())


async def test_a_broken_best_connection_falls_back_to_the_relay():
    async with two_hosts() as (one, two):
        two.set_handler(ECHO, echo)
        await adopt_both(one, two, socketpair(), "relay")
        left, right = socketpair()
        await adopt_both(one, two, (left, right), "punched")
        await left.aclose()
        await until(lambda: len(one.connections(two.peer_id)) == 1)
        await says(one, two.peer_id)
        assert one.connected() == {two.peer_id}


class Relay:
    """A circuit dialer whose relay is a socketpair."""

    def __init__(self, two, caller):
        self.two = two
        self.caller = caller
        self.dialed = []
        self.streams = []

    async def dial(self, addr, peer):
        self.dialed.append((addr, trio.current_time()))
        left, right = socketpair()
        self.streams.append(right)
        trio.lowlevel.spawn_system_task(self._answer, right)
        return left, info("relay", outbound=True, relay="R")

    async def _answer(self, stream):
        with suppress(Unavailable):
            await self.two.adopt(self.caller, stream, info("relay", outbound=False))


async def test_circuit_addresses_go_to_the_dialer_when_the_others_failed():
    async with two_hosts() as (one, two):
        relay = Relay(two, one.peer_id)
        one.set_circuit_dialer(relay.dial)
        started = trio.current_time()
        await one.connect(
            two.peer_id,
            [
                "/ip4/127.0.0.1/tcp/1",
                f"{CIRCUIT_ADDR}/p2p/{two.peer_id}",
            ],
        )
        ((addr, at),) = relay.dialed
        assert addr == "/ip4/127.0.0.1/tcp/4/p2p/R"
        assert at - started < 0.2  # a refused dial needs no head start
        assert one.connections(two.peer_id)[0].relay == "R"


async def test_a_silent_direct_address_delays_the_circuit_by_a_head_start():
    async with two_hosts() as (one, two):
        relay = Relay(two, one.peer_id)
        one.set_circuit_dialer(relay.dial)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            started = trio.current_time()
            await one.connect(
                two.peer_id,
                [
                    "/ip4/127.0.0.1/tcp/4/p2p/R/p2p-circuit",
                    f"/ip4/127.0.0.1/tcp/{port}",
                ],
            )
        assert 0.2 <= relay.dialed[0][1] - started < 1.5


async def test_a_direct_address_that_answers_spares_the_relay():
    async with two_hosts() as (one, two):
        relay = Relay(two, one.peer_id)
        one.set_circuit_dialer(relay.dial)
        await one.connect(two.peer_id, [CIRCUIT_ADDR, *two.addrs()])
        assert [each.kind for each in one.connections(two.peer_id)] == ["direct"]
        assert relay.dialed == []


async def test_without_a_dialer_and_to_another_peer_there_is_no_route():
    async with two_hosts() as (one, two):
        with pytest.raises(NoRoute, match="does not use relays"):
            await one.connect(two.peer_id, [CIRCUIT_ADDR])
        one.set_circuit_dialer(Relay(two, one.peer_id).dial)
        with pytest.raises(NoRoute, match="another peer"):
            await one.connect(
                two.peer_id,
                [f"{CIRCUIT_ADDR}/p2p/{one.peer_id}"],
            )


async def test_the_gate_is_asked_about_every_protocol_of_ours():
    gate = ListGate()
    async with host() as one, host(gate) as two:
        two.set_handler(FOREIGN, echo)
        await one.connect(two.peer_id, two.addrs())
        await says(one, two.peer_id, FOREIGN)
        gate.refused.add((one.peer_id, FOREIGN))
        with pytest.raises(RemoteRefused):
            await one.open_stream(two.peer_id, FOREIGN)


async def test_announced_addresses_are_what_others_hear():
    async with host() as one, host() as relay:
        (listening,) = one.listen_addrs()
        assert one.addrs() == (f"{listening}/p2p/{one.peer_id}",)
        circuit = f"{relay.addrs()[0]}/p2p-circuit"
        one.announce([circuit, "/ip4/203.0.113.9/tcp/4801"])
        assert one.addrs() == (
            f"{circuit}/p2p/{one.peer_id}",
            f"/ip4/203.0.113.9/tcp/4801/p2p/{one.peer_id}",
        )
        assert one.listen_addrs() == (listening,)
        one.announce([])
        assert one.addrs() == (f"{listening}/p2p/{one.peer_id}",)
