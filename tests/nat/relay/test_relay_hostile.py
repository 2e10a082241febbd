"""Abuse of a relay between real hosts: refused, counted, and nothing is left."""

import pytest
import trio

from fabric.core.errors import RemoteRefused
from fabric.core.telemetry import REFUSALS
from fabric.net.delimited import receive_message_untrusted
from nat.relay.circuit_streams_service import connect, reserve
from nat.relay.messages import (
    MAX_RELAY_MESSAGE_BYTES,
    PROTOCOL_HOP,
    HopConnect,
    HopStatus,
    Status,
    decode_hop_untrusted,
    encode_hop,
)
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
from tests.net.check_host import resident_bytes

pytestmark = pytest.mark.slow


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
        before = resident_bytes()
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
        assert resident_bytes() - before < 16 << 20
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
            before = resident_bytes()
            async with peer() as made:
                await made.host.connect(hub.id, hub.host.addrs())
                for _ in range(300):
                    with pytest.raises(RemoteRefused):
                        await reserve(made.host, hub.id)
            assert hub.relay.book.num_reservations == 3
            assert resident_bytes() - before < 16 << 20  # of both ends
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
        before = resident_bytes()
        with trio.move_on_after(1.5):
            while True:
                await near.send_all(bytes(1 << 16))  # far reads nothing
        assert resident_bytes() - before < 16 << 20  # of all three
        carried = hub.relay.book.carried[one.id]
        # windows of both hops, the pump's piece, and the kernel's socket pairs
        assert carried < 4 << 20
        await far.aclose()
        await near.aclose()
        await until(lambda: not hub.relay.book.circuits)
