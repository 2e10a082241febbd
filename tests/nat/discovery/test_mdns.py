"""What is announced, and what of the neighbours' words is believed."""

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import MeshId, peer_id_of
from nat.discovery.mdns import (
    MAX_ADDRS,
    MAX_NEW_PER_WINDOW,
    MAX_PEERS,
    MAX_TEXT_BYTES,
    REPEAT_SECONDS,
    WINDOW_SECONDS,
    Announcement,
    Neighbours,
    encode_text,
    local_addrs,
    new_name,
    read_text_untrusted,
    tag_of,
)
from nat.discovery.mdns_zeroconf import MAX_WAITING_NAMES, Inbox

MESH = MeshId("a" * 64)
TAG = tag_of(MESH)
PEER, OTHER = peer_id_of(b"1" * 32), peer_id_of(b"2" * 32)


def addr(ip="192.168.1.2", port=4801, peer=PEER):
    version = "ip6" if ":" in ip else "ip4"
    return f"/{version}/{ip}/tcp/{port}/p2p/{peer}"


def test_the_mesh_id_is_not_said():
    assert len(TAG) == 16
    assert tag_of(MeshId("b" * 64)) != TAG
    text = encode_text([addr()], TAG)
    assert MESH[:8].encode() not in text


def test_the_name_is_as_the_spec_wants_it():
    name = new_name(random.Random(0))
    assert 32 <= len(name) < 64
    assert name.isalnum()
    assert name == name.lower()
    assert name != new_name(random.Random(1))


def test_members_read_what_members_say():
    addrs = (addr(), addr("2001:db8::1"), addr(port=1))
    heard = read_text_untrusted(encode_text(addrs, TAG), TAG)
    assert heard == Announcement(PEER, addrs)
    assert read_text_untrusted(encode_text(addrs, tag_of(MeshId("b"))), TAG) is None
    libp2p_only = b"".join(
        bytes([len(s)]) + s for s in [b"dnsaddr=" + a.encode() for a in addrs]
    )
    assert read_text_untrusted(libp2p_only, TAG) is None


def test_what_means_nothing_to_a_neighbour_is_not_said_and_not_believed():
    circuit = f"/ip4/192.0.2.9/tcp/1/p2p/{OTHER}/p2p-circuit/p2p/{PEER}"
    bad = [addr("127.0.0.1"), addr("224.0.0.1"), addr("0.0.0.0"), circuit]
    bad += [f"/dns4/example.org/tcp/1/p2p/{PEER}", addr(port=0), addr(port=70000)]
    assert local_addrs([*bad, addr()]) == (addr(),)
    assert local_addrs([addr("127.0.0.1")], loopback=True) == (addr("127.0.0.1"),)
    assert read_text_untrusted(encode_text(bad, TAG), TAG) is None
    heard = read_text_untrusted(encode_text([*bad[:4], addr()], TAG), TAG)
    assert heard.addrs == (addr(),)


def test_announcements_fit_a_packet():
    many = [addr(f"10.0.0.{i}", 10000 + i) for i in range(1, 40)]
    assert len(encode_text(many, TAG)) <= MAX_TEXT_BYTES
    assert len(local_addrs(many)) == MAX_ADDRS
    kept = local_addrs(many)
    assert read_text_untrusted(encode_text(kept, TAG), TAG).addrs == kept


@pytest.mark.parametrize(
    "text",
    [
        encode_text([addr(), addr(peer=OTHER)], TAG),
        encode_text([], TAG),
        encode_text(["/ip4/10.0.0.1/tcp/1"], TAG),
        encode_text(["/ip4/10.0.0.1/tcp/1/p2p/nobody"], TAG),
        encode_text([addr()], TAG)[:-1],
        b"\x00" * 1000,
        bytes(MAX_TEXT_BYTES + 1),
        encode_text([], TAG) + b"\x0adnsaddr=\xff\xff",
    ],
    ids=["two", "none", "nameless", "nobody", "cut", "many", "long", "not_ascii"],
)
def test_malformed_announcements(text):
    with pytest.raises(RemoteProtocolError):
        read_text_untrusted(text, TAG)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_an_announcement_or_an_error(data, tagged):
    text = encode_text([], TAG) + data if tagged else data
    with contextlib.suppress(RemoteProtocolError):
        heard = read_text_untrusted(text, TAG)
        assert heard is None or 0 < len(heard.addrs) <= MAX_ADDRS


def someone(number, ip="10.0.0.1"):
    peer = peer_id_of(number.to_bytes(32, "big"))
    return Announcement(peer, (addr(ip, peer=peer),))


def test_neighbours_are_bounded_in_rate_and_number():
    heard, now, accepted = Neighbours(PEER), 0.0, 0
    for number in range(2000):
        accepted += heard.accept(someone(number), now)
        now += 0.01
    assert accepted == 2 * MAX_NEW_PER_WINDOW
    for number in range(2000, 5000):
        heard.accept(someone(number), now)
        now += WINDOW_SECONDS / MAX_NEW_PER_WINDOW
    assert len(heard) == MAX_PEERS
    assert heard.dropped > 1000
    assert heard.accept(someone(9999), now + 5000.0)


def test_one_neighbour_changes_its_mind_at_a_bounded_rate():
    heard = Neighbours(PEER)
    assert not heard.accept(Announcement(PEER, (addr(),)), 0.0)
    assert heard.accept(someone(1), 0.0)
    assert not heard.accept(someone(1), 1.0)
    assert not heard.accept(someone(1, "10.0.0.9"), 2.0)
    assert heard.accept(someone(1, "10.0.0.9"), 1.0 + REPEAT_SECONDS)


def test_the_inbox_is_bounded_and_holds_each_name_once():
    woken = []
    inbox = Inbox(lambda: woken.append(1))
    for _ in range(2):
        for number in range(MAX_WAITING_NAMES + 10):
            inbox.put(f"name-{number}")
    inbox.put("x" * 300)
    assert len(woken) == MAX_WAITING_NAMES
    assert inbox.dropped == 21
    taken = []
    while (name := inbox.take()) is not None:
        taken.append(name)
    assert len(taken) == MAX_WAITING_NAMES
