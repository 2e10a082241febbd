from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from libp2p.host.autonat.autonat import AutoNATService as TheirService

from fabric.core.errors import NoRoute, RemoteRefused, Unavailable
from fabric.core.protobuf import encode_varint
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.config import HostConfig
from fabric.net.delimited import MessageStream
from fabric.net.libp2p_dialback import DialBack
from fabric.net.libp2p_host import open_host
from nat.reachability.autonat_client_service import E_NONCE, AutonatAsker
from nat.reachability.autonat_messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_DIAL_BACK,
    PROTOCOL_DIAL_REQUEST,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    decode_v2_untrusted,
    encode_dial_back,
    encode_v2,
)
from nat.reachability.autonat_service import E_LIMIT, E_TARGET, AutonatService
from nat.reachability.config import AutonatConfig
from tests.net.check_host import ListGate

pytestmark = pytest.mark.slow
CONFIG = AutonatConfig(dial_seconds=2, request_seconds=5)


def host(**settings):
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), **settings)
    return open_host(config, Ed25519Signer.generate(), ListGate(), Counters())


@asynccontextmanager
async def pair(config=CONFIG, serve=True):
    """A client and a server, connected by the client."""
    with trio.fail_after(20):
        async with host() as client, host() as server:
            if serve:
                dial_back = DialBack(HostConfig())
                AutonatService(server, dial_back, config, server.counters)
            await meet(client, server)
            yield client, server


async def meet(one, two):
    await one.connect(two.peer_id, two.addrs())
    while one.peer_id not in two.connected():  # noqa: ASYNC110  # both sides
        await trio.sleep(0.01)


def listening(opened):
    return opened.listen_addrs()[0]


def asker(client):
    return AutonatAsker(client, CONFIG, client.counters)


async def test_an_address_that_answers_is_proven_and_a_dead_one_is_not():
    async with pair() as (client, server):
        dead = "/ip4/127.0.0.1/tcp/1"
        asking = asker(client)
        good, bad = await asking.ask(server.peer_id, [listening(client), dead])
        assert (good.reached, good.proven) == (True, True)
        assert (bad.address, bad.reached) == (dead, False)
        assert client.connected() == {server.peer_id}  # the dial-back left


async def test_another_ip_is_dialled_after_dial_data():
    async with pair() as (client, server):
        port = listening(client).rsplit("/", 1)[1]
        (verdict,) = await asker(client).ask(
            server.peer_id, [f"/ip4/127.0.0.2/tcp/{port}"]
        )
        assert verdict.reached is False  # the host listens on 127.0.0.1 alone
        # 30 KB went to the server before
        assert server.counters.snapshot().get(f"{REFUSALS}:{E_TARGET}", 0) == 0


async def test_a_dial_back_comes_from_a_port_of_its_own():
    async with pair() as (client, server):
        seen = []
        asking = asker(client)
        original = asking._on_dial_back

        async def record(peer, stream):
            seen.extend(client.connections(peer))
            await original(peer, stream)

        client.set_handler(PROTOCOL_DIAL_BACK, record)
        await asking.ask(server.peer_id, [listening(client)])
        (info,) = seen
        assert not info.outbound
        assert info.remote.rsplit(":", 1)[1] != listening(server).rsplit("/", 1)[1]


async def test_someone_else_at_the_address_is_not_us():
    async with pair() as (client, server), host() as other:
        (verdict,) = await asker(client).ask(server.peer_id, [listening(other)])
        assert verdict.reached is False


async def send_request(client, server, request):
    stream = await client.open_stream(server.peer_id, PROTOCOL_DIAL_REQUEST)
    messages = MessageStream(stream, MAX_MESSAGE_BYTES)
    await messages.send(encode_v2(request))
    return stream, messages


async def test_nobody_is_dialled_before_the_data_is_paid():
    async with pair() as (client, server):
        with trio.socket.socket() as victim:
            await victim.bind(("127.0.0.2", 0))
            victim.listen()
            port = victim.getsockname()[1]
            request = DialRequest((f"/ip4/127.0.0.2/tcp/{port}",), 1)
            stream, messages = await send_request(client, server, request)
            ask = decode_v2_untrusted(await messages.receive_untrusted())
            assert isinstance(ask, DialDataRequest)
            missing = ask.num_bytes - 4096
            while missing > 0:
                await messages.send(encode_v2(DialData(4096)))
                missing -= 4096
            with trio.move_on_after(0.3) as waited:
                await victim.accept()
            assert waited.cancelled_caught
            await messages.send(encode_v2(DialData(4096)))
            await messages.send(encode_v2(DialData(4096)))
            with trio.fail_after(3):
                conn, _ = await victim.accept()
            conn.close()
            await stream.aclose()


@pytest.mark.parametrize(
    "garbage", [encode_v2(DialData(10)), b"\xff\xff", b"", encode_v2(DialData(0))]
)
async def test_garbage_instead_of_dial_data_ends_the_request(garbage):
    async with pair() as (client, server):
        request = DialRequest(("/ip4/127.0.0.2/tcp/9",), 1)
        stream, messages = await send_request(client, server, request)
        await messages.receive_untrusted()
        await messages.send(garbage)
        if garbage != encode_v2(DialData(10)):
            with pytest.raises((Unavailable, trio.BrokenResourceError)):
                await messages.receive_untrusted()
        await stream.aclose()
        verdicts = await asker(client).ask(server.peer_id, [listening(client)])
        assert verdicts[0].reached  # the server goes on


async def test_a_flood_of_requests_is_rejected_and_counted():
    config = AutonatConfig(per_peer_minute=3, dial_seconds=2)
    async with pair(config) as (client, server):
        addrs = [listening(client)] * 6
        verdicts = await asker(client).ask(server.peer_id, addrs)
        assert [v.reached for v in verdicts] == [True] * 3 + [None] * 3
        assert server.counters.snapshot()[f"{REFUSALS}:{E_LIMIT}"] == 3


async def test_a_request_over_a_relay_is_refused(monkeypatch):
    async with pair() as (client, server):
        monkeypatch.setattr(server, "connections", lambda peer: ())
        (verdict,) = await asker(client).ask(server.peer_id, [listening(client)])
        assert verdict.reached is None
        assert "REFUSED" in verdict.reason


async def test_a_server_that_claims_success_is_not_believed():
    async def lie(peer, stream):
        messages = MessageStream(stream, MAX_MESSAGE_BYTES)
        request = decode_v2_untrusted(await messages.receive_untrusted())
        # the nonce on the connection that the client made
        await client_told(request.nonce)
        await messages.send(
            encode_v2(DialResponse(ResponseStatus.OK, 0, DialStatus.OK))
        )

    async def client_told(nonce):
        stream = await server.open_stream(client.peer_id, PROTOCOL_DIAL_BACK)
        message = encode_dial_back(nonce)
        await stream.send_all(encode_varint(len(message)) + message)
        await stream.receive_some()

    async with pair(serve=False) as (client, server):
        server.set_handler(PROTOCOL_DIAL_REQUEST, lie)
        (verdict,) = await asker(client).ask(server.peer_id, [listening(client)])
        assert verdict.reached is None
        assert client.counters.snapshot()[f"{REFUSALS}:{E_NONCE}"] == 1


async def test_guessed_nonces_are_counted_and_change_nothing():
    async with pair() as (client, server):
        asking = asker(client)
        dial_back = DialBack(HostConfig())
        ip, port = "127.0.0.1", int(listening(client).rsplit("/", 1)[1])
        for nonce in range(5):
            message = encode_dial_back(nonce)
            await dial_back.tell(
                client.peer_id,
                ip,
                port,
                PROTOCOL_DIAL_BACK,
                encode_varint(len(message)) + message,
            )
        assert client.counters.snapshot()[f"{REFUSALS}:{E_NONCE}"] == 5
        assert (await asking.ask(server.peer_id, [listening(client)]))[0].reached


async def test_a_peer_that_serves_neither_version_refuses():
    async with pair(serve=False) as (client, server):
        with pytest.raises(RemoteRefused):
            await asker(client).ask(server.peer_id, [listening(client)])


async def test_version_1_of_ours_answers_us():
    async with pair() as (client, server):
        server.basic.remove_stream_handler(PROTOCOL_DIAL_REQUEST)
        good, *rest = await asker(client).ask(
            server.peer_id, [listening(client)], "127.0.0.1"
        )
        assert (good.reached, good.proven, rest) == (True, False, [])
        (bad,) = await asker(client).ask(
            server.peer_id, ["/ip4/127.0.0.1/tcp/1"], "127.0.0.1"
        )
        assert bad.reached is False


async def test_version_1_of_py_libp2p_answers_us():
    async with pair(serve=False) as (client, server):
        TheirService(server.basic)
        (good,) = await asker(client).ask(
            server.peer_id, [listening(client)], "127.0.0.1"
        )
        assert good.reached
        (other,) = await asker(client).ask(
            server.peer_id, ["/ip4/127.0.0.9/tcp/1"], "127.0.0.1"
        )
        assert other.reached is None  # not our IP: it refused


async def test_py_libp2ps_client_of_version_1_is_answered():
    async with pair() as (client, _):
        theirs = TheirService(client.basic, serve=False)
        (server_id,) = client.basic.get_network().get_connections_map()
        status, addr = await theirs.query_server(server_id)
        assert status == 0  # OK
        assert addr


async def test_a_dial_back_says_why_it_failed():
    dial_back = DialBack(HostConfig())
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(host())
        port = int(listening(one).rsplit("/", 1)[1])
        stranger = Ed25519Signer.generate().peer_id
        with trio.fail_after(10):
            await dial_back.reach(one.peer_id, "127.0.0.1", port)
            with pytest.raises(NoRoute, match="refused"):
                await dial_back.reach(one.peer_id, "127.0.0.1", 1)
            with pytest.raises(NoRoute, match="is not"):
                await dial_back.reach(stranger, "127.0.0.1", port)
            with pytest.raises(Unavailable) as error:
                await dial_back.tell(one.peer_id, "127.0.0.1", port, "/none/1", b"")
            assert not isinstance(error.value, NoRoute)
