"""A relay between real hosts on loopback: what it carries, and what it refuses."""

import hashlib
import os
import resource

import pytest
import trio

from fabric.core.errors import NoRoute, RemoteRefused
from fabric.core.telemetry import REFUSALS, SENT_BYTES
from nat.circuit_streams_service import connect, reserve
from nat.relay_config import RelayConfig
from nat.relay_messages import (
    MAX_RELAY_MESSAGE_BYTES,
    PROTOCOL_HOP,
    HopConnect,
    HopStatus,
    Limit,
    Status,
    decode_hop_untrusted,
    encode_hop,
)
from nat.relay_pump_service import receive_message_untrusted
from nat.relay_service import RelayService
from tests.nat.relay_network import (
    SECONDS,
    client,
    peer,
    relay,
    reserved,
    stream_of,
    until,
)

pytestmark = pytest.mark.slow


async def data_circuit(one, two):
    """Return both ends of a data circuit as streams."""
    one.addresses[two.id] = two.announced
    with trio.fail_after(SECONDS):
        near = await one.circuits.open_data(two.id)
        claimed, far = await two.arrived.receive()
    assert claimed == one.id
    return stream_of(near), stream_of(far)


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


FAST = {
    "max_bytes_per_second": 1e12,
    "max_bytes_per_second_per_peer": 1e12,
    "max_bytes_per_second_per_circuit": 1e12,
}


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
        (info,) = one.host.connections(two.id)
        assert (info.kind, info.outbound, info.relay) == ("relay", True, hub.id)
        (info,) = two.host.connections(one.id)
        assert (info.kind, info.outbound, info.relay) == ("relay", False, hub.id)
        binding = one.host.channel_binding(two.id)
        assert binding == two.host.channel_binding(one.id)
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


async def test_the_byte_rate_is_kept_within_five_percent():
    rate = 4e6
    async with (
        relay(max_bytes_per_second_per_circuit=rate, burst_seconds=0.05) as hub,
        client() as one,
        client() as two,
    ):
        await reserved(two, hub)
        near, far = await data_circuit(one, two)
        total = 5 << 20
        seconds = await transfer(near, far, total)  # both directions share it
        assert 2 * total / seconds == pytest.approx(rate, rel=0.05)
        await near.aclose()
        await far.aclose()


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


async def ask(who, hub, data):
    """Send ``data`` on a hop stream and return the answer's status."""
    async with await who.host.open_stream(hub.id, PROTOCOL_HOP) as stream:
        await stream.send_all(data)
        body = await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
        answer = decode_hop_untrusted(body)
        assert isinstance(answer, HopStatus)
        return answer.status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\xff\xff\xff\xff\xff\xff", Status.MALFORMED_MESSAGE),
        (b"\x81\x20" + bytes(8), Status.MALFORMED_MESSAGE),  # 4,097 bytes to come
        (b"\x03\x08\x01\xff", Status.MALFORMED_MESSAGE),
        (b"\x00", Status.MALFORMED_MESSAGE),
        (b"\x02\x08\x09", Status.MALFORMED_MESSAGE),
        (encode_hop(HopStatus(status=100)), Status.UNEXPECTED_MESSAGE),
    ],
    ids=["endless", "long", "cut", "empty", "type", "status"],
)
async def test_frames_that_lie_are_answered_and_counted(data, status):
    async with relay() as hub, peer() as one:
        await one.host.connect(hub.id, hub.host.addrs())
        with trio.fail_after(SECONDS):
            assert await ask(one, hub, data) == status
        assert sum(hub.relay.book.refused.values()) == 1
        assert (await reserve(one.host, hub.id)).status == Status.OK


async def test_slow_requests_take_no_places_for_long():
    async with (
        relay(request_seconds=0.3, max_pending=4, max_pending_per_peer=3) as hub,
        peer() as one,
        peer() as two,
    ):
        for each in (one, two):
            await each.host.connect(hub.id, hub.host.addrs())
        slow = [await one.host.open_stream(hub.id, PROTOCOL_HOP) for _ in range(3)]
        for stream in slow:
            await stream.send_all(b"\x20")
        await until(lambda: hub.relay._pending.total() == 3)
        with trio.fail_after(SECONDS):
            # it has used up its own places only
            status = await ask(one, hub, encode_hop(HopConnect(two.id)))
            assert status == Status.RESOURCE_LIMIT_EXCEEDED
            assert (await reserve(two.host, hub.id)).status == Status.OK
            await until(lambda: not hub.relay._pending)
            assert (await reserve(one.host, hub.id)).status == Status.OK
        assert hub.relay.book.refused["slow_request"] == 3
        assert hub.counted(f"{REFUSALS}:E_RELAY_PENDING_PER_PEER") == 1
        for stream in slow:
            await stream.aclose()


async def test_a_storm_of_connects_is_refused_and_leaves_nothing():
    async with (
        relay(max_circuits_per_peer=4, request_burst=40) as hub,
        client() as one,
        client() as two,
    ):
        await reserved(two, hub)
        await one.host.connect(hub.id, hub.host.addrs())
        opened, refused = [], []

        async def storm():
            try:
                opened.append((await connect(one.host, hub.id, two.id))[0])
            except RemoteRefused as exc:
                refused.append(exc.code)

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(60):
                    nursery.start_soon(storm)
        assert 1 <= len(opened) <= 4
        assert set(refused) == {"E_RELAY_RESOURCE_LIMIT_EXCEEDED"}
        assert len(opened) + len(refused) == 60
        assert len(hub.relay.book.circuits) <= 4
        for stream in opened:
            await stream.aclose()
        await until(lambda: not hub.relay.book.circuits)
        assert not hub.relay._pending


async def test_a_flood_of_reservations_from_one_ip_ends_at_the_limit():
    async with relay(max_reservations_per_ip=3) as hub:
        granted = refused = 0
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                ready = await nursery.start(_flooder, hub)
                granted += ready == Status.OK
                refused += ready == "E_RELAY_RESERVATION_REFUSED"
            assert (granted, refused) == (3, 3)
            assert hub.relay.book.num_reservations == 3
            nursery.cancel_scope.cancel()
        await until(lambda: hub.relay.book.num_reservations == 0)


async def _flooder(hub, *, task_status):
    async with peer() as made:
        await made.host.connect(hub.id, hub.host.addrs())
        try:
            status = (await reserve(made.host, hub.id)).status
        except RemoteRefused as exc:
            status = exc.code
        task_status.started(status)
        await trio.sleep_forever()


async def test_a_reader_that_stalls_holds_a_bounded_part_of_the_relay():
    async with relay(**FAST) as hub, client() as one, client() as two:
        await reserved(two, hub)
        near, far = await data_circuit(one, two)
        with trio.move_on_after(1.5):
            while True:
                await near.send_all(bytes(1 << 16))  # far reads nothing
        carried = hub.relay.book.carried[one.id]
        # windows of both hops, the pump's piece, and the kernel's socket pairs
        assert carried < 4 << 20
        await far.aclose()
        await near.aclose()
        await until(lambda: not hub.relay.book.circuits)
