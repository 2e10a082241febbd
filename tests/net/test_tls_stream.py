"""The RPC connection's TLS stream on real sockets."""

import socket
import time

import pytest
import trio

from fabric.bulk.certificates import issue_identity_certificate
from fabric.bulk.tls import make_context
from fabric.core.errors import FabricError, IntegrityError, Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.net.tls_stream import secure

ALICE, BOB, MALLORY = (
    issue_identity_certificate(Ed25519Signer(name * 32), time.time())
    for name in (b"a", b"b", b"m")
)


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    return left, right


async def meet(client, client_wants, server, server_wants, pair=None):
    """Both ends of a handshake: streams or errors."""
    left, right = pair or tcp_pair()
    ends = {}

    async def side(sock, mine, wanted, is_server):
        context = make_context(mine, wanted, server=is_server)
        try:
            ends[is_server] = await secure(sock, context, wanted, server=is_server)
        except FabricError as exc:
            ends[is_server] = exc

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, left, client, client_wants, False)
            nursery.start_soon(side, right, server, server_wants, True)
    return ends[False], ends[True]


async def test_large_data_passes_both_ways_at_once():
    client, server = await meet(ALICE, BOB.der, BOB, ALICE.der)
    data = bytes(range(256)) * (12 << 10)  # 3 MiB: more than any buffer on the way

    async def receive(stream):
        got = bytearray()
        while len(got) < len(data):
            got += await stream.receive_some(100_000)
        assert got == data

    async with client, server:
        assert client.version() == "TLSv1.3"
        assert client.certificate == BOB.der
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for stream in (client, server):
                    nursery.start_soon(stream.send_all, data)
                    nursery.start_soon(receive, stream)


async def test_a_closed_peer_is_the_end_of_the_stream():
    client, server = await meet(ALICE, BOB.der, BOB, ALICE.der)
    async with client:
        await server.send_all(b"last")
        await server.aclose()
        assert await client.receive_some(10) == b"last"
        assert await client.receive_some(10) == b""


async def test_bytes_forged_on_the_way_break_the_stream():
    left, right = tcp_pair()
    wire = right.dup()  # a second descriptor of the server's end: the attacker's
    client, server = await meet(ALICE, BOB.der, BOB, ALICE.der, (left, right))
    async with client, server:
        wire.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await client.receive_some(10)
    wire.close()


@pytest.mark.parametrize("liar", ["client", "server"])
async def test_the_wrong_certificate_is_refused_and_both_ends_learn_it(liar):
    if liar == "client":
        honest_error, liar_error = reversed(
            await meet(MALLORY, BOB.der, BOB, ALICE.der)
        )
    else:
        honest_error, liar_error = await meet(ALICE, BOB.der, MALLORY, ALICE.der)
    assert isinstance(honest_error, IntegrityError)
    assert isinstance(liar_error, FabricError)


async def test_a_peer_that_leaves_during_the_handshake_is_unavailable():
    left, right = tcp_pair()
    right.close()
    with pytest.raises(Unavailable):
        await secure(
            left, make_context(ALICE, BOB.der, server=False), BOB.der, server=False
        )
    assert left.fileno() == -1
