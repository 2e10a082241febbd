"""Strangers against the control plane: silence, trickles, lies, by the thousand."""

import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.stream.exceptions import StreamReset

from fabric.core.errors import NoRoute, ResourceExhausted, Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.net.libp2p_guard import MAX_HALF_OPEN, MAX_READ_BYTES, check_read
from fabric.net.waiting_room import WaitingRoom
from tests.net.check_host import echo, receive_all, resident_bytes
from tests.net.test_libp2p_host import host, port_of

ECHO = "/fabric/echo/1"
HELLO = b"\x13/multistream/1.0.0\n"
NOISE = b"\x07/noise\n"
MANY = 2200
pytestmark = [pytest.mark.slow]


async def open_many(port, count, said=b""):
    """Open connections while the host runs; return them."""
    found = []
    for _ in range(count):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        if said:
            await stream.send_all(said)
        found.append(stream)
    return found


async def connect_and_open(peer, server):
    await peer.connect(server.peer_id, server.addrs())
    await peer.open_stream(server.peer_id, ECHO)


async def ends(stream):
    """Return whether the host ends ``stream``; what it says before is skipped."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        return True
    return True


async def emptied(room):
    with trio.fail_after(2):
        while len(room):
            await trio.testing.wait_all_tasks_blocked()


async def trickle(stream, data):
    """Send each byte alone, well inside any time-out of a single read."""
    for byte in data:
        await stream.send_all(bytes([byte]))
        with trio.move_on_after(0.1):
            await trio.sleep_forever()


async def flood(stream, size):
    for _ in range(size >> 18):
        await stream.write(bytes(1 << 18))


async def works(server):
    """A newcomer can connect and be served."""
    async with host() as peer:
        await peer.connect(server.peer_id, server.addrs())
        stream = await peer.open_stream(server.peer_id, ECHO)
        async with stream:
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert await receive_all(stream) == b"hello"


@pytest.mark.parametrize(
    "said",
    [b"", HELLO[:5], HELLO, HELLO + NOISE, HELLO + NOISE + b"\x00\x20" + b"x" * 31],
    ids=["nothing", "half a greeting", "greeting", "noise agreed", "half a handshake"],
)
async def test_a_handshake_that_stalls_ends_at_its_deadline(said):
    async with host(upgrade_seconds=0.6, negotiate_seconds=1) as server:
        server.set_handler(ECHO, echo)
        (stream,) = await open_many(port_of(server), 1, said)
        started = trio.current_time()
        with trio.fail_after(5):
            await works(server)
            assert await ends(stream)
        assert trio.current_time() - started < 3
        await emptied(server._swarm._room)
        await stream.aclose()


async def test_a_greeting_byte_by_byte_ends_at_its_deadline():
    async with host(upgrade_seconds=1.0) as server:
        (stream,) = await open_many(port_of(server), 1)
        started = trio.current_time()
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await trickle(stream, HELLO * 50)
        assert trio.current_time() - started < 3
        await stream.aclose()


async def test_thousands_of_half_open_connections_keep_nobody_out():
    async with host(upgrade_seconds=5.0) as server:
        server.set_handler(ECHO, echo)
        before = resident_bytes()
        silent = await open_many(port_of(server), MANY, HELLO)
        with trio.fail_after(8):
            await works(server)
        assert len(server._swarm._room) <= MAX_HALF_OPEN
        assert resident_bytes() - before < 64 << 20  # both ends, Python's and trio's
        dropped = server.counters.snapshot()["dropped_total:half_open_connections"]
        assert dropped >= MANY - MAX_HALF_OPEN - 10
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for stream in silent:
                    nursery.start_soon(ends, stream)
        await emptied(server._swarm._room)
        for stream in silent:
            await stream.aclose()


async def test_places_are_free_again_when_connections_end():
    async with host(max_connections=3) as server:
        server.set_handler(ECHO, echo)
        with trio.fail_after(20):
            for _ in range(6):
                await works(server)


async def test_the_bound_on_connections_holds_for_authenticated_peers():
    async with host(max_connections=2) as server, host() as one, host() as two:
        server.set_handler(ECHO, echo)
        for peer in (one, two):
            await peer.connect(server.peer_id, server.addrs())
        async with host() as third:
            with pytest.raises((NoRoute, Unavailable)):
                await connect_and_open(third, server)
        assert len(server.connected()) == 2


@pytest.mark.parametrize(
    "lie",
    [
        b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # 2**63 - 1
        b"\x80\x80\x80\x80\x10",  # 4 GiB
        b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80",  # no end
        b"\x00",
    ],
)
async def test_a_message_that_lies_about_its_length_ends_the_connection(lie):
    async with host(upgrade_seconds=5.0) as server:
        server.set_handler(ECHO, echo)
        before = resident_bytes()
        (stream,) = await open_many(port_of(server), 1, lie)
        with trio.fail_after(3):
            assert await ends(stream)
            await works(server)
        await stream.aclose()
        assert resident_bytes() - before < 16 << 20


async def test_a_protocol_name_that_lies_about_its_length_ends_the_stream():
    async with host() as server, host() as peer:
        server.set_handler(ECHO, echo)
        await peer.connect(server.peer_id, server.addrs())
        raw = await peer._raw_stream(server.peer_id)
        before = resident_bytes()
        await raw.write(HELLO + b"\x80\x80\x80\x80\x10")
        with trio.fail_after(5):
            with pytest.raises(StreamReset):
                await flood(raw, 64 << 20)  # what it claims is not kept
        assert resident_bytes() - before < 32 << 20
        await works(server)


async def test_an_impostor_is_not_who_was_dialled():
    async with host() as server, host() as peer:
        wanted = Ed25519Signer.generate().peer_id
        addrs = [addr.replace(server.peer_id, wanted) for addr in server.addrs()]
        with pytest.raises(Exception, match="not as") as refused:
            await peer.connect(wanted, addrs)
        assert refused.value.code == "E_WRONG_PEER"
        assert peer.connected() == frozenset()


def test_reads_that_nobody_means_are_refused():
    check_read(None)
    check_read(MAX_READ_BYTES)
    with pytest.raises(ConnectionClosedError):
        check_read(MAX_READ_BYTES + 1)


async def hold(room, source, left, task_status):
    try:
        with room.place(source):
            task_status.started()
            await trio.sleep_forever()
    except ResourceExhausted as exc:
        left.append((source, exc.code))


async def test_the_address_that_holds_most_places_gives_one_up():
    room, left = WaitingRoom(4), []
    async with trio.open_nursery() as nursery:
        for source in ("honest", "flood", "flood", "flood", "flood", "other"):
            await nursery.start(hold, room, source, left)
            await trio.testing.wait_all_tasks_blocked()
            assert len(room) <= 4
        assert left == [("flood", "E_BUSY")] * 2
        assert room.evicted == 2
        nursery.cancel_scope.cancel()
    assert len(room) == 0
    assert len(left) == 2


async def test_a_place_given_up_cannot_be_taken_away():
    room = WaitingRoom(1)
    with room.place("me"):
        room.settle()
        room.settle()
        with room.place("me"):
            await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
    assert room.evicted == 0
