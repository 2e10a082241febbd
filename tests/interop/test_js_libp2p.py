"""js-libp2p talks to our host: over Noise and over TLS, dialling and dialled."""

from contextlib import asynccontextmanager

import pytest
import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS, REFUSALS, Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from tests.interop.conftest import JsError
from tests.net.check_host import ListGate, echo

ECHO = "/fabric/interop/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SECONDS = 15
SECURITY = {"noise": "/noise", "tls": "/tls/1.0.0"}
pytestmark = [pytest.mark.slow, pytest.mark.root]


@asynccontextmanager
async def ours(**settings):
    counters = Counters()
    config = HostConfig(listen=(LOOPBACK,), **settings)
    async with open_host(
        config, Ed25519Signer.generate(), ListGate(), counters
    ) as host:
        host.set_handler(ECHO, echo)
        yield host
    assert counters.snapshot().get(BUGS, 0) == 0


@pytest.mark.parametrize("security", SECURITY)
async def test_js_dials_identifies_pings_and_echoes(js, security):
    async with ours() as host, js(security=[security]) as node:
        address = host.addrs()[0]
        dialled = await node.call("dial", address=address)
        assert dialled["peer"] == host.peer_id
        assert dialled["security"] == SECURITY[security]
        assert dialled["muxer"] == "/yamux/1.0.0"
        told = await node.call("identify", peer=host.peer_id)
        assert ECHO in told["protocols"]
        assert address.partition("/p2p/")[0] in told["addrs"]
        assert "/ip4/127.0.0.1/tcp/" in told["observed"]
        for _ in range(3):
            assert (await node.call("ping", address=address))["ms"] < 5000
        for text in ("hello", "x" * 300_000):  # more than one window
            answer = await node.call("echo", address=address, protocol=ECHO, text=text)
            assert answer["text"] == text


@pytest.mark.parametrize("security", SECURITY)
async def test_we_dial_js_and_echo(js, security):
    async with ours() as host, js(security=[security], listen=[LOOPBACK]) as node:
        with trio.fail_after(SECONDS):
            await host.connect(node.peer, node.addrs)
            async with await host.open_stream(node.peer, ECHO) as stream:
                await stream.send_all(b"from ours")
                assert await stream.receive_some() == b"from ours"
                assert len(host.channel_binding(node.peer, stream)) == 32
        (connection,) = (await node.call("connections"))["connections"]
        assert connection["security"] == SECURITY[security]


async def test_js_with_both_uses_what_it_prefers(js):
    async with ours() as host, js(security=["tls", "noise"]) as node:
        dialled = await node.call("dial", address=host.addrs()[0])
        assert dialled["security"] == SECURITY["tls"]


@pytest.mark.parametrize("security", SECURITY)
async def test_js_that_expects_another_peer_does_not_connect(js, security):
    async with ours() as host, js(security=[security]) as node:
        stranger = Ed25519Signer.generate().peer_id
        address = host.addrs()[0].replace(host.peer_id, stranger)
        with pytest.raises(JsError):
            await node.call("dial", address=address)
        assert host.connected() == frozenset()


async def test_js_without_a_security_protocol_of_ours_is_refused(js):
    async with ours() as host, js(security=[]) as node:
        with pytest.raises(JsError):
            await node.call("dial", address=host.addrs()[0])
        assert host.connected() == frozenset()
        assert not any(name.startswith(REFUSALS) for name in host.counters.snapshot())
