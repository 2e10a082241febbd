"""A relay between real hosts on loopback: what it carries, and what it refuses."""

import hashlib
import math
import os
import resource

import pytest
import trio

from fabric.core.errors import NoRoute, RemoteRefused
from fabric.core.telemetry import REFUSALS, SENT_BYTES
from nat.relay.circuit_streams_service import connect, reserve
from nat.relay.config import RelayConfig
from nat.relay.messages import (
    PROTOCOL_HOP,
    Limit,
)
from nat.relay.service import RelayService
from tests.nat.relay.relay_network import (
    FAST,
    SECONDS,
    client,
    data_circuit,
    peer,
    relay,
    reserved,
    until,
)
from tests.net.check_host import bindings

pytestmark = pytest.mark.slow


async def send(stream, total, digest):
    piece = os.urandom(1 << 16)
    for _ in range(total // len(piece)):
        digest.update(piece)
        await stream.send_all(piece)
    await stream.send_eof()


async def transfer(near, far, total):
    """Carry ``total`` bytes each way at once; return seconds."""
    started = trio.current_time()

    async def receive(stream, digest):
        async for data in stream:
            digest.update(data)

    digests = [hashlib.sha256() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, total, digests[0])
        nursery.start_soon(receive, far, digests[1])
        nursery.start_soon(send, far, total, digests[2])
        nursery.start_soon(receive, near, digests[3])
    assert digests[0].digest() == digests[1].digest()
    assert digests[2].digest() == digests[3].digest()
    return trio.current_time() - started


async def test_a_data_circuit_carries_32_mib_whole_and_says_what_it_costs(
    record_property,
):
    async with relay(**FAST) as hub, client() as one, client() as two:
        await reserved(two, hub)
        near, far = await data_circuit(one, two)
        total = 16 << 20  # each way
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        seconds = await transfer(near, far, total)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - used
        record_property("relayed_mb_per_second", 2 * total / seconds / 1e6)
        record_property("cpu_seconds_per_gb_of_all_three", used / (2 * total / 1e9))
        print(
            f"relayed {2 * total / seconds / 1e6:.0f} MB/s, "
            f"{used / (2 * total / 1e9):.1f} CPU-s/GB (three hosts in one process)"
        )
        await near.aclose()
        await far.aclose()
        await until(lambda: not hub.relay.book.circuits)
        carried = hub.relay.book.carried
        assert carried[one.id] == carried[two.id] >= 2 * total
        assert hub.counted(f"{SENT_BYTES}:relayed") == carried[one.id]


async def test_control_connections_run_over_circuits():
    async with relay() as hub, client() as one, client() as two:
        await reserved(two, hub)

        async def shout(peer, stream):
            await stream.send_all((await stream.receive_some()).upper())

        two.host.set_handler("/fabric/attest/1", shout)
        circuits = [addr for addr in two.host.addrs() if "/p2p-circuit" in addr]
        assert circuits
        with trio.fail_after(SECONDS):
            await one.host.connect(two.id, circuits)
            async with await one.host.open_stream(two.id, "/fabric/attest/1") as stream:
                await stream.send_all(b"admit me")
                assert await stream.receive_some() == b"ADMIT ME"
            binding, theirs = await bindings(one.host, two.host)
            assert binding == theirs
        (info,) = one.host.connections(two.id)
        assert (info.kind, info.outbound, info.relay) == ("relay", True, hub.id)
        (info,) = two.host.connections(one.id)
        assert (info.kind, info.outbound, info.relay) == ("relay", False, hub.id)
        await one.host.disconnect(two.id)
        await until(lambda: not hub.relay.book.circuits)
        await until(lambda: not two.host.connections(one.id))


async def test_a_half_closed_circuit_goes_on_in_the_other_direction():
    async with relay() as hub, client() as one, client() as two:
        await reserved(two, hub)
        near, far = await data_circuit(one, two)
        await near.send_all(b"question")
        await near.send_eof()
        with trio.fail_after(SECONDS):
            assert b"".join([part async for part in far]) == b"question"
            await far.send_all(b"answer")
            assert await near.receive_some() == b"answer"
            await far.send_eof()
            assert await near.receive_some() == b""
        await until(lambda: not hub.relay.book.circuits)
        await near.aclose()
        await far.aclose()


BUDGETS = [
    ("max_bytes_per_second_per_circuit", 1e6),
    ("max_bytes_per_second_per_peer", 2e6),
    ("max_bytes_per_second", 2e6),
]


async def fill(stream):
    while True:
        await stream.send_all(bytes(1 << 16))


async def drain(stream):
    async for _ in stream:
        pass


async def carried_rate(hub, peer, start, size):
    """Return what is carried for ``peer`` per second, once ``start`` bytes were."""
    points = []
    for threshold in (start, start + size):
        await until(
            lambda threshold=threshold: hub.relay.book.carried[peer] >= threshold
        )
        points.append((hub.relay.book.carried[peer], trio.current_time()))
    (bytes_before, began), (bytes_after, ended) = points
    return (bytes_after - bytes_before) / (ended - began)


@pytest.mark.parametrize(("name", "rate"), BUDGETS)
async def test_two_busy_circuits_keep_each_budget_within_five_percent(name, rate):
    """Of each circuit, of all with one peer, of all: together 2 MB/s, both ways."""
    settings = {**FAST, name: rate, "burst_seconds": 0.3}
    async with (
        relay(**settings) as hub,
        client() as one,
        client() as two,
        client() as three,
        trio.open_nursery() as nursery,
    ):
        await reserved(two, hub)
        other = three if name == "max_bytes_per_second" else one
        pairs = [await data_circuit(one, two), await data_circuit(other, two)]
        for stream in (stream for pair in pairs for stream in pair):
            nursery.start_soon(fill, stream)
            nursery.start_soon(drain, stream)
        found = await carried_rate(hub, two.id, start=2 << 20, size=7 << 20)
        assert found == pytest.approx(2e6, rel=0.05)
        nursery.cancel_scope.cancel()
        for stream in (stream for pair in pairs for stream in pair):
            stream.socket.close()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("max_circuits_per_peer", "E_RELAY_RESOURCE_LIMIT_EXCEEDED"),
        ("max_circuits", "E_RELAY_RESOURCE_LIMIT_EXCEEDED"),
    ],
)
async def test_circuits_beyond_the_budget_are_refused_and_freed_ones_given(name, code):
    async with relay(**{name: 2}) as hub, client() as one, client() as two:
        await reserved(two, hub)
        await one.host.connect(hub.id, hub.host.addrs())
        held = [(await connect(one.host, hub.id, two.id))[0] for _ in range(2)]
        with pytest.raises(RemoteRefused) as refused:
            await connect(one.host, hub.id, two.id)
        assert refused.value.code == code
        assert len(hub.relay.book.circuits) == 2
        for stream in held:
            await stream.aclose()
        await until(lambda: not hub.relay.book.circuits)
        stream, _ = await connect(one.host, hub.id, two.id)
        await stream.aclose()


async def reset_after(stream, piece, pieces=1000):
    """Send until the relay resets the circuit, which it must."""

    async def send_all():
        for _ in range(pieces):
            await stream.send_all(piece)
        while await stream.receive_some():
            pass

    with pytest.raises(trio.BrokenResourceError):
        await send_all()
    await stream.aclose()


async def test_strangers_get_a_small_circuit_and_members_are_told_of_none():
    async with (
        relay(stranger_circuit_bytes=100_000) as hub,
        peer() as one,
        client() as two,
    ):
        await reserved(two, hub)
        hub.gate.strangers.add(one.id)
        two.gate.strangers.add(one.id)
        with trio.fail_after(SECONDS):
            await one.host.connect(hub.id, hub.host.addrs())
            stream, answer = await connect(one.host, hub.id, two.id)
            assert answer.limit == Limit(duration_seconds=120, data_bytes=100_000)
            await reset_after(stream, bytes([0x13]) * 10_000)
        await until(lambda: not hub.relay.book.circuits)
        assert hub.relay.book.refused["circuit_bytes"] >= 1
        assert hub.counted(f"{REFUSALS}:E_RELAY_CIRCUIT_BYTES") >= 1
        hub.gate.strangers.clear()
        stream, answer = await connect(one.host, hub.id, two.id)
        assert answer.limit.unlimited
        await stream.aclose()


async def test_who_is_admitted_through_a_circuit_keeps_it():
    async with relay(stranger_circuit_bytes=20_000) as hub, client() as one:
        async with client() as two:
            await reserved(two, hub)
            hub.gate.strangers.add(one.id)
            two.host.set_handler("/fabric/attest/1", _echo)
            with trio.fail_after(SECONDS):
                circuits = [a for a in two.host.addrs() if "/p2p-circuit" in a]
                await one.host.connect(two.id, circuits)
                (circuit,) = hub.relay.book.circuits
                assert circuit.stranger
                hub.gate.strangers.clear()  # it was admitted
                stream = await one.host.open_stream(two.id, "/fabric/attest/1")
                async with stream:
                    for _ in range(10):
                        await stream.send_all(bytes(10_000))
                        got = 0
                        while got < 10_000:
                            got += len(await stream.receive_some())
            assert not circuit.stranger
            assert circuit.ends_at == math.inf
            assert max(circuit.carried) > 100_000


async def _echo(peer, stream):
    async for data in stream:
        await stream.send_all(data)


async def test_an_idle_circuit_is_closed():
    async with relay(idle_seconds=0.3) as hub, client() as one, client() as two:
        await reserved(two, hub)
        near, far = await data_circuit(one, two)
        with trio.fail_after(SECONDS):
            assert await near.receive_some() == b""
            assert await far.receive_some() == b""
        await until(lambda: not hub.relay.book.circuits)
        await near.aclose()
        await far.aclose()


async def test_a_circuit_ends_with_its_time():
    async with relay(circuit_seconds=1) as hub, client() as one, client() as two:
        await reserved(two, hub)
        await one.host.connect(hub.id, hub.host.addrs())
        stream, answer = await connect(one.host, hub.id, two.id)
        assert answer.limit == Limit(duration_seconds=1)
        with trio.fail_after(SECONDS):
            await reset_after(stream, b"\x13/multistream/1.0.0\n", pieces=1)
        await until(lambda: not hub.relay.book.circuits)


async def test_statuses_say_why_not():
    async with relay() as hub, peer() as one, peer() as two:
        for each in (one, two):
            await each.host.connect(hub.id, hub.host.addrs())
        with trio.fail_after(SECONDS):
            with pytest.raises(NoRoute) as error:
                await connect(one.host, hub.id, two.id)
            assert error.value.code == "E_RELAY_NO_RESERVATION"
            await reserve(two.host, hub.id)  # but it serves no stop streams
            with pytest.raises(NoRoute) as error:
                await connect(one.host, hub.id, two.id)
            assert error.value.code == "E_RELAY_CONNECTION_FAILED"
            await two.host.disconnect(hub.id)
            await until(lambda: not hub.relay.book.num_reservations)
            with pytest.raises(NoRoute) as error:
                await connect(one.host, hub.id, two.id)
            assert error.value.code == "E_RELAY_NO_RESERVATION"
        assert error.value.next_step
        assert hub.relay.book.circuits == frozenset()


async def test_it_relays_while_the_world_reaches_it():
    async with relay(volunteer="auto") as hub, peer() as one:
        await one.host.connect(hub.id, hub.host.addrs())
        assert not hub.relay.active
        with pytest.raises(RemoteRefused) as error:
            await reserve(one.host, hub.id)  # the protocol is not even served
        assert error.value.code == "E_PROTOCOL_REFUSED"
        hub.relay.set_public(True)
        assert hub.relay.active
        answer = await reserve(one.host, hub.id)
        assert answer.reservation.addrs == hub.host.addrs()
        hub.relay.set_public(False)
        with pytest.raises(RemoteRefused) as error:
            await reserve(one.host, hub.id)
        assert error.value.code == "E_RELAY_PERMISSION_DENIED"
    async with relay(volunteer="never") as hub:
        hub.relay.set_public(True)
        assert not hub.relay.active


async def test_nothing_is_reserved_or_connected_over_a_relay():
    async with relay() as hub, relay() as far_hub, client() as one, client() as two:
        # two relays and is itself reached through the hub
        two.relay = far_hub.relay
        await reserved(two, hub)
        two.host.set_handler(PROTOCOL_HOP, _hop_of(two))
        await one.host.connect(two.id, [a for a in two.host.addrs() if "circuit" in a])
        with trio.fail_after(SECONDS), pytest.raises(RemoteRefused) as error:
            await reserve(one.host, two.id)
        assert error.value.code == "E_RELAY_PERMISSION_DENIED"


def _hop_of(who):
    service = RelayService(
        who.host,
        who.signer,
        lambda _: True,
        RelayConfig(volunteer="always"),
        who.counters,
    )
    return service._serve_hop
