import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.portmap.gateway import (
    Gateway,
    Route,
    default_gateways,
    parse_ipv4_routes,
    parse_ipv6_routes,
)

HEADER = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
little_endian = pytest.mark.skipif(
    sys.byteorder != "little", reason="the sample is of a little-endian machine"
)


@little_endian
def test_ipv4_routes_best_first():
    text = HEADER + (
        "wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0\n"
        "eth0 00000000 014DA8C0 0003 0 0 100 00000000 0 0 0\n"
        "eth0 004DA8C0 00000000 0001 0 0 100 00FFFFFF 0 0 0\n"  # the network itself
        "ppp0 00000000 00000000 0001 0 0 50 00000000 0 0 0\n"  # no router to ask
        "tun0 00000000 01000A0A 0003 0 0 0 00000080 0 0 0\n"  # half the world
        "eth1 00000000 01000A0A 0002 0 0 0 00000000 0 0 0\n"  # down
    )
    assert parse_ipv4_routes(text) == [
        Route(100, "192.168.77.1", "eth0"),
        Route(600, "192.168.1.1", "wlan0"),
    ]


def test_ipv6_routes_best_first():
    zero, router = "0" * 32, "fe80" + "0" * 27 + "1"
    text = (
        f"{zero} 00 {zero} 00 {router} 00000400 00000001 00000000 00000003 eth0\n"
        f"{zero} 00 {zero} 00 {router} 00000100 00000001 00000000 00450003 wlan0\n"
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
        f"fe80{'0' * 28} 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth0\n"
    )
    assert parse_ipv6_routes(text) == [
        Route(256, "fe80::1", "wlan0"),
        Route(1024, "fe80::1", "eth0"),
    ]


@given(st.lists(st.text("0123456789abc \t", max_size=60)))
def test_short_lines_are_no_routes(lines):
    text = "\n".join(" ".join(line.split()[:7]) for line in lines)
    assert parse_ipv4_routes(text) == []
    assert parse_ipv6_routes(text) == []


def test_families():
    assert Gateway(address="fe80::1", interface="eth0", source="2001:db8::1").is_ipv6
    assert not Gateway(address="10.0.0.1", interface="e", source="10.0.0.2").is_ipv6


def test_this_machine_has_a_gateway_or_a_reason():
    found = default_gateways()
    assert bool(found.ipv4) != bool(found.reason)
    if found.ipv4:
        assert found.ipv4.source.count(".") == 3


def test_elsewhere_the_reason_names_the_platform(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    assert default_gateways().reason == "no gateway lookup on plan9"
