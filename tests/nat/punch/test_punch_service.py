"""Punching over real sockets of this machine; NATs are in test_punch_lab.py."""

import socket

import pytest
import trio

from fabric.core.errors import NoRoute, RemoteRefused, Unavailable
from fabric.core.framing import FrameReader, encode_frame
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS
from nat.punch.config import PunchConfig
from nat.punch.facts import FAILED, IMPOSSIBLE, NatFacts
from nat.punch.messages import (
    PROTOCOL_PUNCH,
    PUNCH,
    PunchConnect,
    PunchRefused,
    PunchSync,
)
from tests.nat.punch.punch_pair import pair

SYMMETRIC = NatFacts("address_dependent", "address_and_port_dependent")


async def until(condition, seconds=5):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


def stream_of(sock):
    assert sock.getblocking() is False
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def receive_frame(stream):
    reader = FrameReader(max_bytes=4096)
    while True:
        for frame in reader.feed(await stream.receive_some(4096)):
            return PUNCH.decode_untrusted(frame)


async def say(stream, message):
    await stream.send_all(encode_frame(PUNCH.encode(message)))


async def test_both_ends_hold_the_same_socket():
    async with pair() as (one, two):
        for asker, other in ((one, two), (two, one)):
            with trio.fail_after(5):
                async with stream_of(await asker.puncher.punch(other.peer)) as ours:
                    theirs = await other.accepted.receive()
                    assert ours.socket.getsockname() == theirs.socket.getpeername()
                    await ours.send_all(b"label and more")
                    assert await theirs.receive_some(5) == b"label"  # and no nonce
                    await theirs.send_all(b"answer")
                    assert await ours.receive_some(6) == b"answer"
                    await theirs.aclose()


async def test_many_at_once_are_as_many_sockets():
    async with pair() as (one, two):
        socks = []

        async def punch():
            socks.append(await one.puncher.punch(two.peer))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(punch)
        assert len({sock.getsockname()[1] for sock in socks}) == 8
        for sock in socks:
            sock.close()


async def test_without_observers_there_is_nothing_to_punch_and_it_says_so():
    config = PunchConfig(punch_seconds=0.2, prove_seconds=0.1)
    async with pair(config, ears=0) as (one, two):
        with pytest.raises(NoRoute) as error:
            await one.puncher.punch(two.peer)
        assert error.value.code == FAILED
        assert error.value.next_step
        with pytest.raises(NoRoute, match="next try in"):
            await one.puncher.punch(two.peer)
        one.puncher.network_changed()
        with pytest.raises(NoRoute, match="crossed"):
            await one.puncher.punch(two.peer)


async def test_the_impossible_is_not_tried_and_the_reason_is_kept():
    async with pair(facts=(SYMMETRIC, SYMMETRIC), ears=0) as (one, two):
        with trio.fail_after(2):
            for _ in range(2):
                with pytest.raises(NoRoute, match="both sides map") as error:
                    await one.puncher.punch(two.peer)
                assert error.value.code == IMPOSSIBLE
        assert two.counters.snapshot()[f"{REFUSALS}:{IMPOSSIBLE}"] == 1


async def test_a_peer_that_is_not_connected_or_refuses_is_told_apart():
    async with pair() as (one, two):
        two.host.gate.refused.add((one.peer, PROTOCOL_PUNCH))
        with pytest.raises(RemoteRefused):
            await one.puncher.punch(two.peer)
        await one.host.disconnect(two.peer)
        with pytest.raises(Unavailable):
            await one.puncher.punch(two.peer)


@pytest.mark.parametrize("asker_is_public", [True, False])
async def test_a_side_that_cannot_be_punched_dials_the_others_public_listener(
    asker_is_public,
):
    """No observers, so only the door is left: the data-plane listener hands it over."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    door = f"127.0.0.1:{listener.getsockname()[1]}"
    doors = ((door,), ()) if asker_is_public else ((), (door,))
    async with pair(listeners=doors, ears=1) as (one, two):
        public = one if asker_is_public else two
        # the dance would also succeed at the punched port itself on one machine
        for end in (one, two):
            end.puncher._exchange._plan = only_doors(end.puncher._exchange._plan)

        async def data_listener():
            sock = trio.socket.from_stdlib_socket(listener)
            while True:
                got, _ = await sock.accept()
                label = b""
                while len(label) < 16:
                    label += await got.recv(16 - len(label))
                plain = socket.socket(fileno=got.detach())
                assert not public.puncher.claim(bytes(16), plain)
                if not public.puncher.claim(label, plain):  # too early: it comes again
                    plain.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(data_listener)
            with trio.fail_after(5):
                async with stream_of(await one.puncher.punch(two.peer)) as ours:
                    theirs = await two.accepted.receive()
                    end = ours if asker_is_public else theirs
                    assert end.socket.getsockname() == listener.getsockname()
                    await theirs.send_all(b"hello")
                    assert await ours.receive_some(5) == b"hello"
                    await theirs.aclose()
            nursery.cancel_scope.cancel()
    listener.close()


def only_doors(plan):
    def planned(*args):
        return (), plan(*args)[1]

    return planned


@pytest.mark.slow
async def test_spares_are_ready_replaced_and_dropped():
    config = PunchConfig(bulk_sockets=2, spare_idle_seconds=3.0)
    async with pair(config) as (one, two):
        first = await one.puncher.punch(two.peer)
        await until(lambda: one.puncher.num_spares(two.peer) == 2)
        assert two.puncher.num_spares(one.peer) == 0  # they belong to the asker
        began = trio.current_time()
        spare = await one.puncher.punch(two.peer)
        assert trio.current_time() - began < 0.005  # it was there
        await until(lambda: one.puncher.num_spares(two.peer) == 2)
        await until(lambda: one.puncher.num_spares(two.peer) == 0, seconds=8)
        first.close()
        spare.close()


@pytest.mark.slow
async def test_a_spare_that_died_is_not_handed_out():
    async with pair(PunchConfig(bulk_sockets=2)) as (one, two):
        (await one.puncher.punch(two.peer)).close()
        await until(lambda: one.puncher.num_spares(two.peer) == 2)
        for _ in range(3):  # the first was used, two are spares
            await (await two.accepted.receive()).aclose()
        with trio.fail_after(5):
            sock = await one.puncher.punch(two.peer)
            theirs = await two.accepted.receive()
            while theirs.socket.getpeername() != sock.getsockname():
                theirs = await two.accepted.receive()
        async with stream_of(sock) as ours:
            await theirs.send_all(b"alive")
            assert await ours.receive_some(5) == b"alive"


@pytest.mark.slow
async def test_what_a_cancelled_caller_punched_becomes_a_spare():
    async with pair(PunchConfig(bulk_sockets=1)) as (one, two):
        with trio.move_on_after(0) as scope:
            await one.puncher.punch(two.peer)
        assert scope.cancelled_caught
        await until(lambda: one.puncher.num_spares(two.peer) == 1)
        one.puncher.forget(two.peer)
        assert one.puncher.num_spares(two.peer) == 0


async def ask(one, two, connect, *, sync=True):
    """Play the initiator by hand; return the answer and what happened after SYNC."""
    stream = await one.host.open_stream(two.peer, PROTOCOL_PUNCH)
    await say(stream, connect)
    answer = await receive_frame(stream)
    if sync and isinstance(answer, PunchConnect):
        await say(stream, PunchSync())
    return stream, answer


async def test_forbidden_addresses_of_a_connect_are_counted():
    """That no packet leaves is seen in test_punch_lab.py, by a gateway's counters."""
    names = ("10.255.0.1:8080", "192.168.1.1:8080", "127.0.0.2:22", "169.254.1.1:9000")
    async with pair(PunchConfig(punch_seconds=0.1, prove_seconds=0.1)) as (one, two):
        await ask(one, two, PunchConnect(nonce=b"n" * 16, addresses=names))
        refused = two.counters.snapshot()[f"{REFUSALS}:punch_target"]
        assert refused == len(names)


async def test_a_stranger_that_answers_at_the_punched_port_is_not_handed_over():
    async with pair(PunchConfig(punch_seconds=0.5, prove_seconds=0.2)) as (one, two):
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        connect = PunchConnect(nonce=b"n" * 16, addresses=(where,))
        stream, answer = await ask(one, two, connect)
        sock = trio.socket.from_stdlib_socket(listener)
        with trio.fail_after(2):
            stranger, _ = await sock.accept()
            await stranger.send(b"x" * 16)  # not the nonce
            assert await stranger.recv(16) == b""
        # many who connect to the punched port and say nothing do not pile up either
        at = int(answer.addresses[0].rpartition(":")[2])
        silent = [trio.socket.socket() for _ in range(40)]
        for one_silent in silent:
            with trio.move_on_after(0.05):
                try:
                    await one_silent.connect(("127.0.0.1", at))
                except OSError:
                    continue
        with trio.move_on_after(2):
            while await stream.receive_some():
                pass
        assert two.accepted.statistics().current_buffer_used == 0
        for open_socket in (*silent, stranger, sock):
            open_socket.close()


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(b"\xc1"),
        encode_frame(PUNCH.encode(PunchSync())),
        b"\xff\xff\xff\xff",
        encode_frame(PUNCH.encode(PunchConnect(nonce=bytes(16)))) * 2,
    ],
)
async def test_malformed_requests_are_counted(data):
    async with pair() as (one, two):
        stream = await one.host.open_stream(two.peer, PROTOCOL_PUNCH)
        await stream.send_all(data)
        counter = f"{PROTOCOL_ERRORS}:punch"
        await until(lambda: two.counters.snapshot().get(counter) == 1)


async def test_a_peer_that_asks_without_end_is_refused():
    config = PunchConfig(max_inbound_per_peer=3, inbound_burst=3)
    async with pair(config) as (one, two):
        streams, answers = [], []
        for _ in range(4):
            connect = PunchConnect(nonce=bytes(16))
            stream, answer = await ask(one, two, connect, sync=False)
            streams.append(stream)
            answers.append(answer)
        assert all(isinstance(answer, PunchConnect) for answer in answers[:3])
        assert isinstance(answers[3], PunchRefused)
        assert answers[3].code == "E_PUNCH_BUSY"
        for stream in streams:
            await stream.aclose()
