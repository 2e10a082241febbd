"""Strangers and members against the data plane: silence, replays, theft, floods."""

import os
import socket
import ssl
import time
from contextlib import suppress

import pytest
import trio

from fabric.bulk.certificates import issue_identity_certificate
from fabric.bulk.tls import make_context
from fabric.core.errors import RemoteRefused, ResourceExhausted, Unavailable
from fabric.core.framing import encode_frame
from fabric.net.budget_config import BudgetConfig
from fabric.net.data_config import DataConfig
from fabric.net.offers import (
    LABEL_BYTES,
    OFFER_REPLY,
    OFFER_REQUEST,
    ForBulk,
    ForRpc,
    OfferGranted,
    OfferRefused,
    OfferRequest,
)
from fabric.net.ports import PROTOCOL_OFFER
from tests.net.check_host import resident_bytes
from tests.net.test_data_plane import SIGNERS, A, B, network, until

MANY = 2200
pytestmark = pytest.mark.slow


def where(node):
    host, port = node.plane.addresses()[0].split(":")
    return host, int(port)


async def ask(nodes, purpose, certificate, frame=None):
    """Return B's answer to A's offer request."""
    stream = await nodes[A].host.open_stream(B, PROTOCOL_OFFER)
    async with stream:
        request = OFFER_REQUEST.encode(OfferRequest(purpose, certificate))
        await stream.send_all(encode_frame(request) if frame is None else frame)
        answer = await stream.receive_some(1 << 16)
        return OFFER_REPLY.decode_untrusted(answer[4:]) if answer else None


async def ends(stream):
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    return True


def counted(node, name):
    return node.counters.snapshot().get(name, 0)


@pytest.mark.parametrize("said", [b"", b"x" * (LABEL_BYTES - 1)])
async def test_a_label_that_does_not_come_ends_the_connection(said):
    config = DataConfig(handshake_timeout_seconds=0.5)
    async with network(config=config) as nodes:
        stream = await trio.open_tcp_stream(*where(nodes[B]))
        await stream.send_all(said) if said else None
        with trio.fail_after(3):
            assert await ends(stream)
        await stream.aclose()


async def test_a_label_byte_by_byte_ends_at_the_deadline():
    config = DataConfig(handshake_timeout_seconds=0.5)
    async with network(config=config) as nodes:
        stream = await trio.open_tcp_stream(*where(nodes[B]))
        started = trio.current_time()
        for _ in range(LABEL_BYTES - 1):
            with trio.move_on_after(0.1):
                if await stream.receive_some(1) == b"":
                    break
            await stream.send_all(b"x")
        assert trio.current_time() - started < 1.5
        await stream.aclose()


async def test_tls_that_stalls_after_a_good_label_ends_at_the_deadline():
    config = DataConfig(handshake_timeout_seconds=0.5)
    async with network(config=config) as nodes:
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: None)
        ours = nodes[A].plane.identity()
        for purpose in (ForRpc(), ForBulk("s")):
            sock, _, _ = await nodes[A].plane.dial(B, purpose, ours.der)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await stream.send_all(b"\x16\x03\x01\xff\xff")  # a record of 65,535 B
            with trio.fail_after(3):
                assert await ends(stream)
            await stream.aclose()
        assert await nodes[A].rpc.call(B, "x.echo", b"fine") == b"fine"


async def half_open(nodes, count):
    return [await trio.open_tcp_stream(*where(nodes[B])) for _ in range(count)]


async def close_all(streams):
    for stream in streams:
        await stream.aclose()


async def test_thousands_of_half_open_connections_cost_little_and_end():
    config = DataConfig(handshake_timeout_seconds=3.0)
    async with network(config=config) as nodes:
        before = resident_bytes()
        silent = await half_open(nodes, MANY)
        assert nodes[B].plane._arrivals.pending <= config.max_pending_connections
        assert resident_bytes() - before < 64 << 20  # both ends
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for stream in silent:
                    nursery.start_soon(ends, stream)
        await close_all(silent)
        assert nodes[B].plane._arrivals.pending == 0
        assert await nodes[A].rpc.call(B, "x.echo", b"fine") == b"fine"


async def test_half_open_connections_keep_no_member_out():
    config = DataConfig(handshake_timeout_seconds=5.0)
    async with network(config=config) as nodes:
        silent = await half_open(nodes, config.max_pending_connections + 50)
        try:
            with trio.fail_after(3):
                assert await nodes[A].rpc.call(B, "x.echo", b"fine") == b"fine"
        finally:
            await close_all(silent)


async def test_a_label_is_good_once():
    async with network() as nodes:
        served = []
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: served.append(peer))
        answer = await ask(nodes, ForBulk("s"), nodes[A].plane.identity().der)
        assert isinstance(answer, OfferGranted)
        first, second = await half_open(nodes, 2)
        await first.send_all(answer.label)
        await until(lambda: len(nodes[B].plane._offers) == 0)
        await second.send_all(answer.label)
        with trio.fail_after(3):
            assert await ends(second)
        assert counted(nodes[B], "protocol_errors_total:data") == 1
        await close_all([first, second])
        assert served == []


async def test_a_stolen_label_is_of_no_use_without_the_key_that_was_shown():
    async with network() as nodes:
        served = []
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: served.append(peer))
        answer = await ask(nodes, ForBulk("s"), nodes[A].plane.identity().der)
        thief = issue_identity_certificate(SIGNERS["m"], time.time())
        with socket.create_connection(where(nodes[B])) as sock:
            sock.sendall(answer.label)
            context = make_context(thief, answer.certificate, server=False)

            def steal():
                with context.wrap_socket(sock) as tls:
                    return tls.recv(1)

            with suppress(ssl.SSLError, OSError):  # the alert, or the end, if earlier
                assert await trio.to_thread.run_sync(steal) == b""
        await until(lambda: not nodes[B].bulk._live)
        assert served == []


async def test_a_certificate_whose_key_is_not_the_peer_id_is_refused_at_the_offer():
    async with network() as nodes:
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: None)
        foreign = issue_identity_certificate(SIGNERS["m"], time.time())
        for purpose in (ForRpc(), ForBulk("s")):
            answer = await ask(nodes, purpose, foreign.der)
            assert isinstance(answer, OfferRefused)
            assert answer.code == "E_INTEGRITY"
        assert len(nodes[B].plane._offers) == 0


async def test_frames_that_lie_about_their_length_are_refused_before_they_come():
    async with network() as nodes:
        before = resident_bytes()
        for lie in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff" + b"x" * 100):
            assert await ask(nodes, ForRpc(), b"", frame=lie) is None
        assert counted(nodes[B], "protocol_errors_total:offer") == 2
        assert resident_bytes() - before < 16 << 20


async def test_a_flood_of_offers_is_bounded_for_a_peer_and_leaves_room_for_others():
    config = DataConfig(max_offers_per_peer=8, max_offers=64)
    async with network(config=config) as nodes:
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: None)
        der = nodes[A].plane.identity().der
        before = resident_bytes()
        answers = [await ask(nodes, ForBulk("s"), der) for _ in range(500)]
        granted = [a for a in answers if isinstance(a, OfferGranted)]
        refused = [a for a in answers if isinstance(a, OfferRefused)]
        assert len(granted) == len(nodes[B].plane._offers) == 8
        assert {a.code for a in refused} == {"E_BUSY"}
        assert resident_bytes() - before < 16 << 20
        assert len({a.label for a in granted}) == 8


async def test_connections_beyond_the_budget_are_refused_with_what_to_do():
    config = DataConfig(budget=BudgetConfig(max_connections_per_peer=2))
    async with network(config=config) as nodes:
        nodes[B].bulk.serve_bulk("wait", lambda sock, peer: sock.recv(1))
        held = [await nodes[A].bulk.dial_bulk(B, "wait") for _ in range(2)]
        with pytest.raises((RemoteRefused, ResourceExhausted, Unavailable)) as refused:
            await nodes[A].bulk.dial_bulk(B, "wait")
        assert refused.value.code == "E_BUDGET"
        assert refused.value.next_step
        for sock in held:
            sock.close()
        for node in nodes.values():
            await until(lambda node=node: gone(node))
        again = await nodes[A].bulk.dial_bulk(B, "wait")
        again.close()


def gone(node):
    """Have the registry look; return whether it holds no socket any more."""
    node.plane.registry.look(time.monotonic())
    return not node.plane.registry.traffic()


def num_open(traffic):
    return sum(traffic.connections.values())


@pytest.mark.parametrize("size", [1, 1 << 16])
async def test_random_bytes_after_a_good_label_serve_nobody(size):
    async with network() as nodes:
        served = []
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: served.append(peer))
        answer = await ask(nodes, ForBulk("s"), nodes[A].plane.identity().der)
        (stream,) = await half_open(nodes, 1)
        try:
            await stream.send_all(answer.label + os.urandom(size))
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass
        with trio.fail_after(5):
            assert await ends(stream)
        await stream.aclose()
        assert served == []
        assert counted(nodes[B], "bugs_total") == 0


@pytest.mark.parametrize("lie", [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
async def test_a_member_whose_rpc_frame_lies_loses_that_connection_only(lie):
    async with network() as nodes:
        before = resident_bytes()
        stream, _ = await nodes[A].plane.connect(B)  # TLS, both sides authenticated
        await stream.send_all(lie + b"x" * 1000)
        with trio.fail_after(5):
            assert await ends(stream)
        await stream.aclose()
        await until(lambda: counted(nodes[B], "protocol_errors_total:rpc") == 1)
        assert resident_bytes() - before < 16 << 20
        assert await nodes[A].rpc.call(B, "x.echo", b"fine") == b"fine"


async def test_connections_in_all_are_within_the_budget():
    config = DataConfig(budget=BudgetConfig(max_connections=3))
    async with network("abm", config=config) as nodes:
        nodes[B].bulk.serve_bulk("wait", lambda sock, peer: sock.recv(1))
        held = [await nodes[A].bulk.dial_bulk(B, "wait") for _ in range(2)]
        other = SIGNERS["m"].peer_id
        held.append(await nodes[other].bulk.dial_bulk(B, "wait"))
        for node in (nodes[A], nodes[other]):
            with pytest.raises((RemoteRefused, Unavailable)) as refused:
                await node.bulk.dial_bulk(B, "wait")
            assert refused.value.code == "E_BUDGET"
        assert sum(map(num_open, nodes[B].plane.registry.traffic().values())) == 3
        for sock in held:
            sock.close()
        await until(lambda: gone(nodes[B]))
        (await nodes[other].bulk.dial_bulk(B, "wait")).close()
