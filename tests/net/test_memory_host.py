from contextlib import asynccontextmanager

import pytest
import trio

from fabric.core.errors import ConfigError, NoRoute, RemoteRefused, Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import DROPPED, REFUSALS
from fabric.net.host import PeerConnected, PeerDisconnected
from fabric.net.memory_gossip import SUBSCRIBER_ROOM
from fabric.net.memory_host import Conditions, MemoryNetwork
from fabric.net.protocols import GOSSIP_PROTOCOL, KAD_PROTOCOL
from tests.net.check_host import ListGate, echo, receive_all

ECHO = "/fabric/echo/1"
KEY = bytes(32)


def signer(number):
    return Ed25519Signer(number.to_bytes(32, "big"))


@asynccontextmanager
async def network_of(count, mesh=True, seed=1, **conditions):
    """Yield (network, hosts); every host is connected with every other."""
    async with MemoryNetwork(seed, Conditions(**conditions)).run() as network:
        hosts = [network.host(signer(n), ListGate()) for n in range(1, count + 1)]
        for i, one in enumerate(hosts):
            one.set_handler(ECHO, echo)
            for other in hosts[:i] if mesh else hosts[max(0, i - 1) : i]:
                await one.connect(other.peer_id, other.addrs())
        yield network, hosts


def waiting(channel):
    got = []
    while channel.statistics().current_buffer_used:
        got.append(channel.receive_nowait()[1])
    return got


async def test_latency_and_bandwidth_take_virtual_time(autojump_clock):
    conditions = {"latency_seconds": 0.1, "bytes_per_second": 1e6}
    async with network_of(2, **conditions) as (_, (one, two)):
        stream = await one.open_stream(two.peer_id, ECHO)
        start = trio.current_time()
        await stream.send_all(b"x")
        await stream.receive_some()
        assert trio.current_time() - start == pytest.approx(0.2, abs=0.001)
        start = trio.current_time()

        async def send():
            await stream.send_all(bytes(2_000_000))
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert len(await receive_all(stream)) == 2_000_000
        assert 2.0 < trio.current_time() - start < 3.0


async def test_a_partition_breaks_what_crosses_it_and_heals(autojump_clock):
    async with network_of(4) as (network, hosts):
        a, b, c, d = hosts
        crossing = await a.open_stream(c.peer_id, ECHO)
        inside = await a.open_stream(b.peer_id, ECHO)
        events = a.events()
        network.partition([{a.peer_id, b.peer_id}, {c.peer_id, d.peer_id}])
        with pytest.raises(trio.BrokenResourceError):
            await crossing.receive_some()
        await inside.send_all(b"fine")
        assert await inside.receive_some() == b"fine"
        assert a.connected() == {b.peer_id}
        gone = {await events.receive(), await events.receive()}
        assert {event.peer for event in gone} == {c.peer_id, d.peer_id}
        assert all(isinstance(event, PeerDisconnected) for event in gone)
        with pytest.raises(NoRoute):
            await a.connect(c.peer_id, c.addrs())
        network.heal()
        await a.connect(c.peer_id, c.addrs())
        assert await events.receive() == PeerConnected(c.peer_id)


async def test_a_killed_peer_is_gone_and_may_come_back(autojump_clock):
    async with network_of(2) as (network, (one, two)):
        stream = await one.open_stream(two.peer_id, ECHO)
        network.kill(two.peer_id)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert one.connected() == frozenset()
        with pytest.raises(Unavailable):
            await one.open_stream(two.peer_id, ECHO)
        with pytest.raises(NoRoute):
            await one.connect(two.peer_id, two.addrs())
        back = network.host(signer(2), ListGate())
        await one.connect(back.peer_id, back.addrs())
        with pytest.raises(ConfigError):
            network.host(signer(2), ListGate())


async def test_gossip_travels_along_connections_once(autojump_clock):
    async with network_of(5, mesh=False, latency_seconds=1.0) as (_, hosts):
        channels = [host.broadcast.subscribe("t") for host in hosts]
        start = trio.current_time()
        await hosts[0].broadcast.publish("t", b"news")
        forwarder, payload = await channels[4].receive()
        assert trio.current_time() - start == pytest.approx(4.0)
        assert (forwarder, payload) == (hosts[3].peer_id, b"news")
        assert [waiting(channel) for channel in channels[:4]] == [
            [],
            [b"news"],
            [b"news"],
            [b"news"],
        ]
        with pytest.raises(ValueError, match="65537"):
            await hosts[0].broadcast.publish("t", bytes(65537))


async def test_gossip_of_a_refused_neighbour_is_dropped(autojump_clock):
    async with network_of(2) as (_, (one, two)):
        heard = two.broadcast.subscribe("t")
        two.gate.refused.add((one.peer_id, GOSSIP_PROTOCOL))
        await one.broadcast.publish("t", b"news")
        await trio.testing.wait_all_tasks_blocked()
        assert waiting(heard) == []
        assert two.counters.snapshot() == {f"{REFUSALS}:E_NOT_ADMITTED": 1}


async def test_a_slow_subscriber_loses_messages_not_memory(autojump_clock):
    async with network_of(2) as (_, (one, two)):
        heard = two.broadcast.subscribe("t")
        for n in range(SUBSCRIBER_ROOM + 7):
            await one.broadcast.publish("t", b"%d" % n)
        await trio.testing.wait_all_tasks_blocked()
        assert len(waiting(heard)) == SUBSCRIBER_ROOM
        assert two.counters.snapshot() == {f"{DROPPED}:gossip": 7}


async def test_loss_is_a_fraction_that_the_seed_decides(autojump_clock):
    async def received(seed):
        async with network_of(2, seed=seed, loss=0.3) as (_, (one, two)):
            heard = two.broadcast.subscribe("t")
            for n in range(200):
                await one.broadcast.publish("t", b"%d" % n)
            await trio.testing.wait_all_tasks_blocked()
            return sorted(waiting(heard))

    first = await received(7)
    assert 110 < len(first) < 170
    assert await received(7) == first
    assert await received(8) != first


async def test_content_routing_follows_connections_and_gates(autojump_clock):
    async with network_of(4, mesh=False) as (network, hosts):
        first, last = hosts[0], hosts[3]
        assert await first.routing.provide(KEY) == 3
        assert await hosts[1].routing.provide(KEY) == 3
        found = await last.routing.find_providers(KEY, 10)
        assert set(found) == {first.peer_id, hosts[1].peer_id}
        assert len(await last.routing.find_providers(KEY, 1)) == 1
        network.partition([{last.peer_id}])
        assert await first.routing.provide(bytes([1]) * 32) == 2
        hosts[1].gate.refused.add((first.peer_id, KAD_PROTOCOL))
        assert await first.routing.provide(bytes([2]) * 32) == 1


async def test_streams_to_a_refused_protocol_do_not_open(autojump_clock):
    async with network_of(2) as (_, (one, two)):
        two.gate.refused.add((one.peer_id, ECHO))
        with pytest.raises(RemoteRefused) as error:
            await one.open_stream(two.peer_id, ECHO)
        assert error.value.next_step
