"""Golden bytes, round trips, hostile bytes."""

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from nat.multiaddr_bytes import (
    MAX_MULTIADDR_BYTES,
    decode_multiaddr_untrusted,
    decode_multiaddrs_untrusted,
    encode_multiaddr,
    tcp_endpoint,
    tcp_multiaddr,
)

PEER = "12D3KooWGzBXWXyxoyLwPL3rZLVgZ4Z3NQNhCLLwKJMPHLSZRZyN"
IPS = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: str(ipaddress.IPv4Address(n))),
    st.integers(0, 2**128 - 1).map(lambda n: str(ipaddress.IPv6Address(n))),
)


@pytest.mark.parametrize(
    ("text", "golden"),
    [
        # the addresses of multiformats' own test vectors
        ("/ip4/127.0.0.1/tcp/1234", "047f0000010604d2"),
        ("/ip4/127.0.0.1/udp/1234", "047f000001910204d2"),
        ("/ip6/2001:8a0:7ac5:4201:3ac9:86ff:fe31:7095/tcp/8000",
         "29200108a07ac542013ac986fffe317095061f40"),
        ("/ip4/1.2.3.4/tcp/80/p2p-circuit", "0401020304060050a202"),
        ("/ip4/1.2.3.4/udp/80/quic-v1", "040102030491020050cd03"),
    ],
)  # fmt: skip
def test_golden(text, golden):
    assert encode_multiaddr(text).hex() == golden
    assert decode_multiaddr_untrusted(bytes.fromhex(golden)) == text


@given(IPS, st.integers(0, 65535))
def test_round_trip(ip, port):
    text = tcp_multiaddr(ip, port)
    assert decode_multiaddr_untrusted(encode_multiaddr(text)) == text
    assert tcp_endpoint(text) == (ip, port)
    circuit = f"{text}/p2p/{PEER}/p2p-circuit"
    assert decode_multiaddr_untrusted(encode_multiaddr(circuit)) == circuit
    assert tcp_endpoint(f"{text}/p2p/{PEER}") == (ip, port)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_text_none_or_a_protocol_error(data):
    with contextlib.suppress(RemoteProtocolError):
        text = decode_multiaddr_untrusted(data)
        assert text is None or text.startswith("/")


@given(st.text(max_size=40))
def test_any_text_gives_bytes_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        encode_multiaddr(text)
    tcp_endpoint(text)


def test_a_list_keeps_what_can_be_read():
    good = encode_multiaddr("/ip4/192.0.2.1/tcp/4801")
    unknown = bytes.fromhex("0401020304910204d2d103")  # ../webtransport
    cut = good[:-1]
    long = b"\x04" * (MAX_MULTIADDR_BYTES + 1)
    found = decode_multiaddrs_untrusted([unknown, cut, long, b"", good, good])
    assert found == ("/ip4/192.0.2.1/tcp/4801",)


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/192.0.2.1/udp/1",
        "/ip4/192.0.2.1/tcp/1/ws",
        "/ip4/192.0.2.1/tcp/1/p2p-circuit",
        "/ip4/192.0.2.1/tcp/1/ws/x",
        "/ip6/192.0.2.1/tcp/1",
        "/dns4/example/tcp/1",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/1/",
        "",
    ],
)
def test_only_plain_tcp_addresses_are_endpoints(text):
    assert tcp_endpoint(text) is None
