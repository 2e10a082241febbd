import errno
import ipaddress
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.telemetry import Counters
from nat.reachability import netwatch_service
from nat.reachability.netwatch import NetworkChanged, NetworkView, NetworkWatch, view_of
from nat.reachability.netwatch_netlink import (
    Address,
    DumpEnded,
    Link,
    Neighbour,
    Route,
    dump_request,
    parse_untrusted,
)
from nat.reachability.netwatch_service import open_netwatch

ETH = 2
GATEWAY = "192.168.1.1"


LAB = "tests.nat.reachability.netwatch_lab"


def address(ip, *, link=ETH, tentative=False):
    return Address(link, ip, 24, tentative, False)


def default(gateway=GATEWAY, *, link=ETH):
    return Route(link, gateway, True, False)


def neighbour(mac, ip=GATEWAY):
    return Neighbour(ETH, ip, mac, False)


def test_a_view_is_what_connections_rest_on():
    view = view_of(
        [
            Link(ETH, True),
            Link(3, False),
            address("192.168.1.7"),
            address("10.0.0.1", link=3),
            address("fd00::5", tentative=True),
            default(),
            default("10.0.0.254", link=3),
            Route(ETH, "192.168.1.9", False, False),
            neighbour("02:01"),
            neighbour("02:02", "192.168.1.50"),
            DumpEnded(),
        ]
    )
    assert view == NetworkView(frozenset({"192.168.1.7/24"}), {"192.168.1.1": "02:01"})
    assert view.ips() == {"192.168.1.7"}


def watching():
    watch = NetworkWatch()
    watch.start(NetworkView(frozenset({"192.168.1.7/24"}), {GATEWAY: "02:01"}))
    return watch


def seen(*ips, mac="02:01", gateway=GATEWAY):
    return NetworkView(frozenset(f"{ip}/24" for ip in ips), {gateway: mac})


def test_addresses_that_come_and_go_are_news():
    watch = watching()
    assert watch.update(seen("192.168.1.7")) is None
    assert watch.update(seen("192.168.1.8")) == NetworkChanged(
        gone_addresses=frozenset({"192.168.1.7"}),
        new_addresses=frozenset({"192.168.1.8"}),
    )
    assert watch.update(seen("192.168.1.8", "fe80::1")) is None


def test_another_gateway_is_news_and_so_is_another_machine_with_its_address():
    watch = watching()
    assert watch.update(seen("192.168.1.7", gateway="192.168.1.254")).gateway_changed
    watch = watching()
    assert watch.update(seen("192.168.1.7", mac="02:99")).gateway_changed


def test_a_mac_that_is_unknown_for_a_while_is_compared_later():
    watch = watching()
    assert watch.update(seen("192.168.1.7", mac="")) is None
    assert watch.update(seen("192.168.1.7", mac="02:01")) is None
    assert watch.update(seen("192.168.1.7", mac="")) is None
    assert watch.update(seen("192.168.1.7", mac="02:77")).gateway_changed


def test_what_has_no_bearing_is_no_reason_to_look():
    watch = watching()
    assert not watch.matters([neighbour("02:05", "192.168.1.50")])
    assert not watch.matters([Route(ETH, "10.0.0.1", False, False)])
    assert not watch.matters([])
    assert watch.matters([neighbour("02:05")])
    assert watch.matters([default("")])
    assert watch.matters([address("10.0.0.1")])
    assert watch.matters([Link(ETH, False)])


views = st.builds(
    NetworkView,
    st.frozensets(st.ip_addresses().map(lambda ip: f"{ip}/24"), max_size=4),
    st.dictionaries(
        st.ip_addresses(v=4).map(str),
        st.sampled_from(["", "02:01", "02:02"]),
        max_size=2,
    ),
)


@pytest.mark.slow
@given(views, st.lists(views, max_size=6))
def test_changes_add_up_to_the_last_view(first, later):
    watch = NetworkWatch()
    watch.start(first)
    ips = set(first.ips())
    for view in later:
        changed = watch.update(view)
        if changed is not None:
            assert changed != NetworkChanged()
            assert changed.gone_addresses <= ips
            ips = ips - changed.gone_addresses | changed.new_addresses
        assert watch.update(view) is None
    ips_of_last = map(ipaddress.ip_address, (later or [first])[-1].ips())
    lasting = {str(i) for i in ips_of_last if i.version == 4 or not i.is_link_local}
    assert lasting <= ips


# netlink


def message(kind, body, flags=0):
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def attribute(kind, value):
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def test_messages_of_the_kernel_are_read():
    data = b"".join(
        [
            message(
                20, struct.pack("=BBBBI", 2, 24, 0, 0, 7) + attribute(2, b"\n\0\0\1")
            ),
            message(
                24,
                struct.pack("=8BI", 2, 0, 0, 0, 254, 3, 0, 1, 0)
                + attribute(5, b"\n\0\0\xfe")
                + attribute(4, struct.pack("=I", 7)),
            ),
            message(
                28,
                struct.pack("=BBHiHBB", 2, 0, 0, 7, 2, 0, 1)
                + attribute(1, b"\n\0\0\xfe")
                + attribute(2, b"\2\0\0\0\0\1"),
            ),
            message(16, struct.pack("=BBHiII", 0, 0, 1, 7, 0x41, 0)),
            message(17, struct.pack("=BBHiII", 0, 0, 1, 8, 0x41, 0)),
            message(99, b"news"),
            message(3, struct.pack("=i", 0)),
        ]
    )
    assert parse_untrusted(data) == [
        Address(7, "10.0.0.1", 24, False, False),
        Route(7, "10.0.0.254", True, False),
        Neighbour(7, "10.0.0.254", "02:00:00:00:00:01", False),
        Link(7, True),
        Link(8, False),
        DumpEnded(0),
    ]


def test_a_dump_that_a_change_interrupted_says_so():
    link = struct.pack("=BBHiII", 0, 0, 1, 7, 0x41, 0)
    found = parse_untrusted(message(16, link, 0x10) + message(3, bytes(4)))
    assert found == [Link(7, True), DumpEnded(errno.EINTR), DumpEnded(0)]


@pytest.mark.slow
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.builds(
                message,
                st.sampled_from([2, 3, 16, 17, 20, 21, 24, 25, 28, 29, 99]),
                st.binary(max_size=60),
            ),
            max_size=8,
        ).map(b"".join),
    )
)
def test_the_parser_takes_any_bytes(data):
    for each in parse_untrusted(data):
        view_of([each])


def test_a_dump_is_asked_for_as_the_kernel_wants_it():
    assert len(dump_request(22, 1)) == 20


async def test_the_first_view_has_loopback_and_polling_gives_one_too():
    async with open_netwatch(Counters()) as watcher:
        if sys.platform == "linux":
            assert "127.0.0.1/8" in watcher.view().addresses
    assert isinstance(netwatch_service._own_addresses(), NetworkView)


async def test_without_a_kernel_that_tells_it_polls(autojump_clock, monkeypatch):
    views = iter([seen("192.168.1.7"), seen("192.168.1.7"), seen("192.168.1.9")])

    def look():
        return next(views, seen("192.168.1.9"))

    monkeypatch.setattr(netwatch_service, "_own_addresses", look)
    monkeypatch.setattr(netwatch_service.sys, "platform", "other")
    async with open_netwatch(Counters()) as watcher:
        changes = watcher.changes()
        began = trio.current_time()
        changed = await changes.receive()
        assert changed.new_addresses == {"192.168.1.9"}
        assert trio.current_time() - began <= 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs netlink")
async def test_what_was_not_seen_whole_is_not_gone(autojump_clock, monkeypatch):
    """A machine that is too busy to look keeps its addresses, and looks again."""
    calls = iter(["whole", "too late", "changed meanwhile", "whole", "moved"])

    async def dump():
        match next(calls, "moved"):
            case "too late":
                await trio.sleep_forever()
            case "changed meanwhile":
                raise InterruptedError
            case "moved":
                return seen("192.168.1.9")
        return seen("192.168.1.7")

    monkeypatch.setattr(netwatch_service, "_dump", dump)
    async with open_netwatch(Counters()) as watcher:
        changes = watcher.changes()
        with trio.move_on_after(10) as waited:
            await changes.receive()
        assert waited.cancelled_caught
        assert watcher.view() == seen("192.168.1.7")
        assert await watcher._look_again()
        assert (await changes.receive()).gone_addresses == {"192.168.1.7"}


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"),
    reason="needs root, unshare and iproute2",
)
def test_a_real_kernel_tells_of_each_change_within_two_seconds():
    done = subprocess.run(
        [
            "unshare",
            "--net",
            sys.executable,
            "-m",
            LAB,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *steps, last = json.loads(done.stdout)
    by_name = {step["step"]: step for step in steps}
    assert by_name["address"]["new"] == ["10.9.0.7"]
    assert by_name["gone"]["gone"] == ["10.9.0.7"]
    assert by_name["other machine"]["gateway"]
    assert by_name["gateway"]["gateway"]
    assert by_name["cable"]["gone"] == ["10.9.0.2"]
    assert all(step["seconds"] < 2 for step in steps)
    assert not any(addr.startswith("10.") for addr in last["addresses"])
