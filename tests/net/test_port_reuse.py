import errno
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import trio
from libp2p.network.connection.raw_connection import RawConnection

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_transport import FabricTcpStream
from fabric.net.port_reuse import connect, listen_shared, source_for
from tests.net.check_host import ListGate

WILD = ("0.0.0.0", 4801)
LOOP = ("127.0.0.1", 4802)
WILD6 = ("::", 4803)


def port_of(listener):
    return listener.socket.getsockname()[1]


@pytest.mark.parametrize(
    ("target", "listening", "source"),
    [
        ("198.51.100.1", [WILD], WILD),
        ("127.0.0.1", [WILD], WILD),
        ("198.51.100.1", [LOOP], None),
        ("127.0.0.9", [LOOP, WILD], LOOP),
        ("198.51.100.1", [LOOP, WILD], WILD),
        ("127.0.0.1", [("192.0.2.7", 1)], None),
        ("2001:db8::1", [WILD], None),
        ("2001:db8::1", [WILD, WILD6], WILD6),
        ("example.org", [WILD], None),
        ("198.51.100.1", [], None),
    ],
)
def test_a_dial_leaves_from_a_listener_that_fits(target, listening, source):
    assert source_for(target, listening) == source


async def test_a_port_that_listens_is_dialled_from():
    listener, other = listen_shared("127.0.0.1", 0), listen_shared("127.0.0.1", 0)
    async with listener, other:
        own = ("127.0.0.1", port_of(listener))
        async with await connect("127.0.0.1", port_of(other), own) as stream:
            assert stream.socket.getsockname() == own
            async with await other.accept() as accepted:
                assert accepted.socket.getpeername() == own


async def test_a_second_connection_between_the_same_ports_takes_another():
    listener, other = listen_shared("127.0.0.1", 0), listen_shared("127.0.0.1", 0)
    async with listener, other:
        own = ("127.0.0.1", port_of(listener))
        async with (
            await connect("127.0.0.1", port_of(other), own),
            await connect("127.0.0.1", port_of(other), own) as second,
        ):
            assert second.socket.getsockname()[1] != own[1]


async def test_a_shared_port_is_still_taken_for_others():
    listener = listen_shared("127.0.0.1", 0)
    async with listener:
        for ip in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(OSError) as error:  # noqa: PT011  # the number is checked
                listen_shared(ip, port_of(listener))
            assert error.value.errno == errno.EADDRINUSE


async def test_a_refusal_is_told_and_not_retried_from_another_port():
    listener = listen_shared("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with listener:
        with pytest.raises(ConnectionRefusedError):
            await connect("127.0.0.1", port, ("127.0.0.1", port_of(listener)))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_an_ipv6_peer_has_a_remote_address():
    try:
        listener = listen_shared("::1", 0)
    except OSError:
        pytest.skip("no IPv6 loopback here")
    async with listener:
        async with await connect("::1", port_of(listener), None) as stream:
            accepted = await listener.accept()
            async with accepted:
                raw = RawConnection(FabricTcpStream(accepted), False)
                assert raw.get_remote_address() == stream.socket.getsockname()[:2]


@pytest.mark.slow
async def test_a_host_dials_from_the_port_it_listens_on():
    def host():
        config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        return open_host(config, Ed25519Signer.generate(), ListGate(), Counters())

    async with host() as one, host() as two, host() as three:
        for other in (two, three):
            with trio.fail_after(5):
                await one.connect(other.peer_id, other.addrs())
                while one.peer_id not in other.connected():  # noqa: ASYNC110
                    await trio.sleep(0.01)
            network = other.basic.get_network()
            (seen,) = network.get_connections()
            port = int(one.addrs()[0].split("/")[4])
            assert seen.muxed_conn.get_remote_address() == ("127.0.0.1", port)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("iptables") or not shutil.which("unshare"),
    reason="needs root, unshare and iptables",
)
def test_dials_that_cross_on_the_wire_still_connect():
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tests.net.simultaneous_open"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["met"]
    assert result["again"], "the dials did not cross: nothing was tested"
    assert result["seconds"] < 4  # one SYN retransmission is 1 s
