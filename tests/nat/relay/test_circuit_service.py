"""Using relays between real hosts on loopback: choice, loss, and relays that lie."""

import socket
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from fabric.core.errors import NoRoute, RemoteRefused
from fabric.core.telemetry import REFUSALS
from nat.relay.circuit_streams_service import connect
from nat.relay.messages import (
    PROTOCOL_HOP,
    HopStatus,
    decode_hop_untrusted,
    encode_hop,
)
from tests.nat.relay.lying_relay import LyingRelay, fake_relay, held, status
from tests.nat.relay.relay_network import (
    SECONDS,
    client,
    relay,
    reserved,
    stream_of,
    until,
)

pytestmark = pytest.mark.slow


async def open_data(one, two):
    one.addresses[two.id] = two.announced
    with trio.fail_after(SECONDS):
        near = await one.circuits.open_data(two.id)
        _, far = await two.arrived.receive()
    return stream_of(near), stream_of(far)


async def test_two_relays_are_held_announced_and_given_up():
    async with relay() as first, relay() as second, client() as two:
        await reserved(two, first, second)
        assert held(two) == {first.id, second.id}
        for hub in (first, second):
            expected = f"{hub.host.addrs()[0]}/p2p-circuit"
            assert expected in two.announced
            assert f"{expected}/p2p/{two.id}" in two.host.addrs()
        two.circuits.set_wanted(False)
        await until(lambda: two.announced == ())
        assert held(two) == frozenset()


@asynccontextmanager
async def killable(**settings):
    """A relay and a scope that ends it at once."""
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def run(*, task_status):
            with scope:
                async with relay(**settings) as hub:
                    task_status.started(hub)
                    await trio.sleep_forever()

        yield await nursery.start(run), scope
        scope.cancel()


async def test_a_relay_killed_mid_transfer_is_noticed_and_another_is_used():
    async with (
        killable() as (first, kill),
        relay() as second,
        client() as one,
        client() as two,
    ):
        await reserved(two, first)
        near, far = await open_data(one, two)
        two.circuits.set_candidates(
            {each.id: each.host.addrs() for each in (first, second)}
        )
        await until(lambda: held(two) == {first.id, second.id})
        ended = []

        async def send():
            with suppress(trio.BrokenResourceError):
                while True:
                    await near.send_all(bytes(1 << 16))
            ended.append(trio.current_time())

        async def receive():
            with suppress(trio.BrokenResourceError):
                while await far.receive_some():
                    pass
            ended.append(trio.current_time())

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(receive)
                await until(lambda: sum(first.relay.book.carried.values()) > 1 << 20)
                killed = trio.current_time()
                kill.cancel()
        assert max(ended) - killed < 3
        await until(lambda: held(two) == {second.id})
        # the caller still has the old addresses beside the new one
        gone = f"/ip4/127.0.0.1/tcp/1/p2p/{first.id}/p2p-circuit"
        one.addresses[two.id] = [gone, *two.announced]
        with trio.fail_after(SECONDS):
            again = stream_of(await one.circuits.open_data(two.id))
            _, other = await two.arrived.receive()
        other = stream_of(other)
        await again.send_all(b"resumed")
        assert await other.receive_some() == b"resumed"
        for stream in (near, far, again, other):
            await stream.aclose()


async def black_hole(peer, stream):
    await trio.sleep_forever()


async def test_a_black_holed_relay_is_left_within_its_deadline():
    async with (
        fake_relay(black_hole) as hole,
        relay() as good,
        client(connect_seconds=2.0, hedge_seconds=0.3) as one,
        client(reserve_seconds=0.5) as two,
    ):
        two.circuits.set_candidates(
            {each.id: each.host.addrs() for each in (hole, good)}
        )
        await until(lambda: held(two) == {good.id})
        await until(lambda: any("no answer" in s.why for s in status(two)))
        # a caller that is told of both tries the other beside it
        one.addresses[two.id] = [
            f"{hole.host.addrs()[0]}/p2p-circuit",
            *two.announced,
        ]
        started = trio.current_time()
        with trio.fail_after(SECONDS):
            near = await one.circuits.open_data(two.id)
            _, far = await two.arrived.receive()
        assert trio.current_time() - started < 1
        near.close()
        far.close()
        one.addresses[two.id] = [f"{hole.host.addrs()[0]}/p2p-circuit"]
        started = trio.current_time()
        with trio.fail_after(SECONDS), pytest.raises(NoRoute) as error:
            await one.circuits.open_data(two.id)
        assert 2 <= trio.current_time() - started < 3
        assert error.value.code == "E_NO_RELAY"
        assert "made no circuit within 2 s" in error.value.reason


async def test_a_relay_with_small_limits_is_for_signalling_only():
    async with (
        relay(circuit_bytes=128 << 10, circuit_seconds=120) as small,
        client() as one,
        client() as two,
    ):
        await reserved(two, small)
        (known,) = status(two)
        assert known.held
        assert not known.data
        one.addresses[two.id] = two.announced
        with trio.fail_after(SECONDS):
            with pytest.raises(NoRoute, match="signalling only"):
                await one.circuits.open_data(two.id)
            circuits = [a for a in two.host.addrs() if "/p2p-circuit" in a]
            await one.host.connect(two.id, circuits)
        assert one.host.connections(two.id)[0].relay == small.id


async def test_without_relays_there_is_no_route_and_no_crash():
    async with client() as one, client() as two:
        with pytest.raises(NoRoute, match="announces none"):
            await one.circuits.open_data(two.id)
        one.addresses[two.id] = [
            f"/ip4/127.0.0.1/tcp/1/p2p/{two.id}/p2p-circuit",  # the peer itself
        ]
        with pytest.raises(NoRoute, match="announces none"):
            await one.circuits.open_data(two.id)
        # ourselves, but it is not connected with us any more
        one.addresses[two.id] = [f"/ip4/127.0.0.1/tcp/1/p2p/{one.id}/p2p-circuit"]
        with pytest.raises(NoRoute, match="not connected"):
            await one.circuits.open_data(two.id)
        for addr in ("nonsense", f"/ip4/127.0.0.1/tcp/1/p2p/{one.id}"):
            with pytest.raises(NoRoute):
                await one.circuits.dial(addr, two.id)


async def test_a_relay_reaches_those_who_reserved_with_it_by_itself():
    async with client() as one, client() as two:
        one.host.set_handler(PROTOCOL_HOP, LyingRelay(one).serve)
        await reserved(two, one)
        near, far = await open_data(one, two)
        await near.send_all(b"it is me")
        assert await far.receive_some() == b"it is me"
        await near.aclose()
        await far.aclose()


async def test_a_stranger_gets_a_control_circuit_and_no_data_circuit():
    async with relay() as hub, client() as one, client() as two:
        await reserved(two, hub)
        two.gate.strangers.add(one.id)
        one.addresses[two.id] = two.announced
        with trio.fail_after(SECONDS):
            near = stream_of(await one.circuits.open_data(two.id))
            assert await near.receive_some() == b""  # closed before a byte came through
            await near.aclose()
            await one.host.connect(two.id, [f"{two.announced[0]}/p2p/{two.id}"])
        assert two.counted(f"{REFUSALS}:E_NOT_ADMITTED") == 1
        with pytest.raises(trio.WouldBlock):
            two.arrived.receive_nowait()


def close_arrived(who):
    """Close what has arrived, as whoever owns it does when the other end is closed."""
    with suppress(trio.WouldBlock):
        while True:
            who.arrived.receive_nowait()[1].close()
    return True


async def test_cancelled_at_any_time_opening_leaves_nothing():
    async with relay() as hub, client() as one, client() as two:
        await reserved(two, hub)
        one.addresses[two.id] = two.announced
        for delay in (0.0, 0.002, 0.004, 0.006, 0.01, 0.02):
            with trio.move_on_after(delay):
                (await one.circuits.open_data(two.id)).close()
            await until(lambda: close_arrived(two) and not hub.relay.book.circuits)
        await until(lambda: close_arrived(two) and not two.circuits._inbound._open)
        near, far = await open_data(one, two)  # and it still works
        await near.aclose()
        await far.aclose()


async def test_the_socket_is_one_that_a_blocking_worker_can_use():
    async with relay() as hub, client() as one, client() as two:
        await reserved(two, hub)
        one.addresses[two.id] = two.announced
        with trio.fail_after(SECONDS):
            near = await one.circuits.open_data(two.id)
            _, far = await two.arrived.receive()
            assert near.getblocking() is far.getblocking() is False
            near.setblocking(True)
            far.setblocking(True)
            await trio.to_thread.run_sync(near.sendall, bytes(100_000))
            got = 0
            while got < 100_000:
                got += len(await trio.to_thread.run_sync(far.recv, 65536))
            near.shutdown(socket.SHUT_WR)
            assert await trio.to_thread.run_sync(far.recv, 1) == b""
        near.close()
        far.close()


async def test_a_relay_is_asked_again_after_it_had_no_room():
    async with (
        relay(max_reservations=0) as full,
        client(retry_seconds=(0.2,)) as two,
    ):
        two.circuits.set_candidates({full.id: full.host.addrs()})
        await until(lambda: full.relay.book.refused["reservations"] >= 2)
        assert "no room" in status(two)[0].why


async def test_refusals_reach_the_caller_with_their_code():
    async with relay(max_circuits=0) as hub, client() as one, client() as two:
        await reserved(two, hub)
        await one.host.connect(hub.id, hub.host.addrs())
        with trio.fail_after(SECONDS), pytest.raises(RemoteRefused) as error:
            await connect(one.host, hub.id, two.id)
        assert error.value.code == "E_RELAY_RESOURCE_LIMIT_EXCEEDED"
        assert decode_hop_untrusted(encode_hop(HopStatus(status=201))[1:]).status == 201
