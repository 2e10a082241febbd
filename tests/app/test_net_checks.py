"""What this machine can find out about its network, on real sockets."""

import math
import socket
import struct

import pytest
import trio

from fabric.app.cli_net import ping_text
from fabric.app.clock import read_clock_untrusted
from fabric.app.control_messages import PingView
from fabric.app.net_checks import (
    dial_multiaddrs,
    dial_tcp,
    endpoint_of_multiaddr,
    global_ipv6,
    has_packet_filter,
    probe_udp,
)
from fabric.core.errors import RemoteProtocolError

SECONDS = 10


async def test_a_dial_tells_the_error_or_the_route():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with trio.fail_after(SECONDS):
            result = await dial_tcp("127.0.0.1", port)
        assert result.error == ""
        assert result.mtu_bytes >= 1280
        assert 500 < result.mss_bytes < result.mtu_bytes
    with trio.fail_after(SECONDS):
        assert (await dial_tcp("127.0.0.1", port)).error == "connection refused"


async def test_multiaddrs_are_dialled_in_order_and_circuits_are_only_listed():
    peer = "12D3KooWFNsxdwCajpxX8LhGJfrFWvGjUZD45G1EGzHyVZ5Ur63x"
    with socket.create_server(("127.0.0.1", 0)) as server:
        good = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"
        circuit = f"/ip4/127.0.0.1/tcp/1/p2p/{peer}/p2p-circuit"
        addrs = [
            ("/ip4/127.0.0.1/tcp/1", "mdns"),
            (f"{circuit}/p2p/{peer}", "record"),
            (f"{good}/p2p/{peer}", "invite"),
        ]
        with trio.fail_after(SECONDS):
            first, second, third = await dial_multiaddrs(addrs)
    assert (first.error, first.source) == ("connection refused", "mdns")
    assert (second.addr, second.dialled) == ("via VZ5Ur63x", False)
    assert (third.addr, third.error, third.source) == (
        *(good.replace("/ip4/127.0.0.1/tcp/", "127.0.0.1:"), "", "invite"),
    )


@pytest.mark.slow
async def test_port_unreachable_is_an_answer_to_udp():
    with trio.fail_after(SECONDS):
        assert await probe_udp(["127.0.0.1"]) == "answered"
        assert await probe_udp([]) is None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.9", 33434))  # somebody listens and says nothing
            assert await probe_udp(["127.0.0.9"]) == "silent"


def test_what_the_kernel_says_is_read_without_raising():
    assert has_packet_filter() in (True, False, None)
    assert all(":" in addr for addr in global_ipv6())


@pytest.mark.parametrize(
    ("addr", "end"),
    [
        ("/ip4/1.2.3.4/tcp/5/p2p/x", ("1.2.3.4", 5)),
        ("/ip6/2a00::7/tcp/5", ("2a00::7", 5)),
        ("/ip4/1.2.3.4/udp/5", None),
        ("/ip4/1.2.3.4/tcp/5/p2p/x/p2p-circuit", None),
        ("/dns4/example.org/tcp/5", None),
        ("/ip4/1.2.3/tcp/5", None),
        ("/ip4/1.2.3.4/tcp/99999", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_multiaddrs_that_can_be_dialled(addr, end):
    assert endpoint_of_multiaddr(addr) == end


@pytest.mark.parametrize(
    "answer",
    [b"", b"x" * 7, b"x" * 9, *(struct.pack(">d", x) for x in (math.nan, -1.0, 2e13))],
)
def test_a_peer_that_tells_no_time(answer):
    with pytest.raises(RemoteProtocolError):
        read_clock_untrusted(answer)
    assert read_clock_untrusted(struct.pack(">d", 1.5e9)) == 1.5e9


def test_a_ping_shows_the_upgrade():
    relayed = PingView("abcdefghij", "relay", 84.2, ("relay",))
    assert ping_text(relayed) == "cdefghij relay 84 ms"
    direct = PingView("abcdefghij", "direct", 31.4, ("direct", "relay"), "relay", 84.2)
    assert ping_text(direct) == ("cdefghij relay 84 ms -> direct 31 ms  (also relay)")
