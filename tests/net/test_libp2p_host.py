import errno
import socket
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from fabric.core.errors import ConfigError, NoRoute, PeerTimeout
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS, Counters
from fabric.net import libp2p_transport
from fabric.net.config import HostConfig
from fabric.net.host import PeerConnected, PeerReconnected
from fabric.net.libp2p_host import open_host
from fabric.net.port_reuse import listen_shared
from tests.net.check_host import ListGate, bindings, echo

ECHO = "/fabric/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
pytestmark = pytest.mark.slow


def host(signer=None, gate=None, **settings):
    settings.setdefault("listen", (LOOPBACK,))
    return open_host(
        HostConfig(**settings),
        signer or Ed25519Signer.generate(),
        gate or ListGate(),
        Counters(),
    )


def port_of(opened):
    return int(opened.addrs()[0].split("/")[4])


async def test_the_identity_is_the_signers():
    signer = Ed25519Signer.generate()
    async with host(signer) as opened:
        assert opened.peer_id == signer.peer_id


async def test_a_taken_port_is_the_operators_error_and_frees_up():
    async with host() as first:
        taken = f"/ip4/127.0.0.1/tcp/{port_of(first)}"
        with pytest.raises(ConfigError) as error:
            async with host(listen=(LOOPBACK, taken)):
                pass
        assert error.value.code == "E_PORT_IN_USE"
        assert taken in error.value.reason
        assert error.value.next_step
    async with host(listen=(taken,)) as again:
        assert again.addrs() == (f"{taken}/p2p/{again.peer_id}",)


@pytest.mark.parametrize(
    "addr",
    ["nonsense", "/ip4/127.0.0.1/udp/1", "/ip4/1.2.3/tcp/1", "/ip4/192.0.2.1/tcp/0"],
)
async def test_a_bad_listening_address_is_the_operators_error(addr):
    with pytest.raises(ConfigError) as error:
        async with host(listen=(addr,)):
            pass
    assert error.value.code == "E_LISTEN"
    assert error.value.next_step


async def test_a_wildcard_announces_addresses_that_work():
    async with host(listen=("/ip4/0.0.0.0/tcp/0",)) as one, host() as two:
        assert one.addrs()
        assert not any("/0.0.0.0/" in addr for addr in one.addrs())
        await two.connect(one.peer_id, one.addrs())
        assert two.connected() == {one.peer_id}


async def test_announced_addresses_replace_the_listening_ones():
    async with host(announce=("/ip4/203.0.113.9/tcp/4801",)) as opened:
        assert opened.addrs() == (f"/ip4/203.0.113.9/tcp/4801/p2p/{opened.peer_id}",)


@asynccontextmanager
async def silent_port():
    """A port that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_dead_and_silent_addresses_do_not_delay_the_good_one():
    async with host() as one, host() as two, silent_port() as silent:
        addrs = [
            "/ip4/127.0.0.1/tcp/1",
            f"/ip4/127.0.0.1/tcp/{silent}",
            *two.addrs(),
            f"/ip4/127.0.0.1/tcp/{silent}/p2p/{one.peer_id}",
        ]
        with trio.fail_after(2):  # far below the dial limit of 10 s
            await one.connect(two.peer_id, addrs)
        assert one.connected() == {two.peer_id}


async def test_a_silent_address_ends_at_the_dial_limit():
    async with host(dial_seconds=0.2) as one, host() as two, silent_port() as silent:
        with trio.fail_after(5), pytest.raises(NoRoute, match="no answer within"):
            await one.connect(two.peer_id, [f"/ip4/127.0.0.1/tcp/{silent}"])
        await one.connect(two.peer_id, two.addrs())  # no penalty for the peer


async def test_peers_that_dial_each_other_at_once_agree_on_each_streams_binding():
    async with host() as one, host() as two:
        events = one.events()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, two.peer_id, two.addrs())
            nursery.start_soon(two.connect, one.peer_id, one.addrs())
        with trio.fail_after(5):
            for here, there in ((one, two), (two, one)):
                mine, theirs = await bindings(here, there)
                assert mine == theirs
        assert await events.receive() == PeerConnected(two.peer_id)
        with suppress(trio.WouldBlock):  # of two connections the first is news
            assert events.receive_nowait() == PeerReconnected(two.peer_id)
            events.receive_nowait()
            pytest.fail("a third event")


async def test_garbage_on_the_port_harms_nobody():
    async with host(upgrade_seconds=0.3) as one, host() as two:
        one.set_handler(ECHO, echo)
        for garbage in (
            b"",
            b"\x00" * 4096,
            b"\xff" * 70_000,
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(one))
            async with stream:
                await stream.send_all(garbage)
        idle = await trio.open_tcp_stream("127.0.0.1", port_of(one))
        with trio.fail_after(5):
            while await idle.receive_some():  # closed at the upgrade limit
                pass
        await idle.aclose()
        await two.connect(one.peer_id, one.addrs())
        async with await two.open_stream(one.peer_id, ECHO) as stream:
            await stream.send_all(b"still here")
            assert await stream.receive_some() == b"still here"
        assert one.counters.snapshot().get(BUGS, 0) == 0


async def test_a_peer_that_does_not_negotiate_is_a_timeout():
    async def say_nothing(stream):
        await trio.sleep_forever()

    async with host(negotiate_seconds=1) as one, host() as two:
        await one.connect(two.peer_id, two.addrs())
        two.basic.get_network().set_stream_handler(say_nothing)
        with trio.fail_after(5), pytest.raises(PeerTimeout):
            await one.open_stream(two.peer_id, ECHO)


async def test_the_callers_error_leaves_as_itself_and_nothing_is_left_running():
    async def use():
        async with host() as one, host() as two:
            two.set_handler(ECHO, echo)
            await one.connect(two.peer_id, two.addrs())
            await one.open_stream(two.peer_id, ECHO)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await use()


async def test_cancelling_a_host_ends_it_soon():
    with trio.fail_after(5):
        async with host() as one:
            with trio.move_on_after(0.3):
                async with host() as two:
                    await one.connect(two.peer_id, two.addrs())
                    await trio.sleep_forever()
            while one.connected():  # noqa: ASYNC110  # no event for the last check
                await trio.sleep(0.01)


async def test_addresses_with_any_port_get_the_same_and_ipv6_may_be_missing(
    monkeypatch,
):
    listen = ("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.2/tcp/0")
    async with host(listen=listen) as both:
        one, two = (addr.split("/")[4] for addr in both.listen_addrs())
        assert one == two

    def without_ipv6(ip, port):
        if ":" in ip:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")
        return listen_shared(ip, port)

    monkeypatch.setattr(libp2p_transport, "listen_shared", without_ipv6)
    async with host(listen=("/ip4/127.0.0.1/tcp/0", "/ip6/::/tcp/0")) as one:
        assert len(one.listen_addrs()) == 1
    with pytest.raises(ConfigError):
        async with host(listen=("/ip6/::/tcp/0",)):
            pass
