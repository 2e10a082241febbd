"""A CONNECT may name anything; what is dialled is safe whatever it names."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.punch.addresses import (
    MAX_PUBLIC_IPS,
    MAX_TARGETS,
    OwnSide,
    classify_ip,
    is_same_site,
    parse_addresses_untrusted,
    select_targets,
)
from nat.punch.facts import NatFacts

NATED = OwnSide(observed=(("198.51.100.7", 5000),), local=(("192.168.1.2", 5000),))
LOOPBACK = OwnSide(observed=(("127.0.0.1", 5000),), local=(("127.0.0.1", 5000),))
LAN_ONLY = OwnSide(observed=(("10.0.0.2", 5000),), local=(("10.0.0.2", 5000),))
IPS = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: str(ipaddress.IPv4Address(n))),
    st.integers(0, 2**128 - 1).map(lambda n: str(ipaddress.IPv6Address(n))),
    st.sampled_from(
        ["192.168.1.77", "10.0.0.9", "127.0.0.1", "198.51.100.7", "::1", "fe80::1",
         "fd00::1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "::ffff:10.0.0.1"]
    ),
)  # fmt: skip
ADDRESSES = st.lists(st.tuples(IPS, st.integers(0, 65535)), max_size=20)


@pytest.mark.parametrize(
    ("ip", "kind"),
    [
        ("8.8.8.8", "public"),
        ("203.0.113.1", "public"),
        ("2600::1", "public"),
        ("10.1.2.3", "private"),
        ("100.64.0.1", "private"),
        ("172.31.255.255", "private"),
        ("fd12::1", "private"),
        ("127.8.8.8", "loopback"),
        ("::1", "loopback"),
        ("169.254.1.1", "forbidden"),
        ("fe80::1", "forbidden"),
        ("224.0.0.251", "forbidden"),
        ("ff02::fb", "forbidden"),
        ("255.255.255.255", "forbidden"),
        ("0.0.0.0", "forbidden"),
        ("::", "forbidden"),
        ("0.1.2.3", "forbidden"),
        ("::ffff:192.168.1.1", "forbidden"),
        ("2002:c0a8:101::", "forbidden"),
        ("64:ff9b::c0a8:101", "forbidden"),
    ],
)
def test_classes(ip, kind):
    assert classify_ip(ip) == kind


@given(ADDRESSES)
def test_nothing_harmful_is_dialled_for_a_peer_elsewhere(theirs):
    elsewhere = [a for a in theirs if a[0] != "198.51.100.7"]
    targets, refused = select_targets(NATED, elsewhere)
    assert len(targets) <= MAX_TARGETS
    assert set(targets) | set(refused) == set(elsewhere)
    assert not set(targets) & set(refused)
    for ip, port in targets:
        assert classify_ip(ip) == "public"
        assert port >= 1024 or port in (80, 443)
    for family in (4, 6):
        ips = {ip for ip, _ in targets if ipaddress.ip_address(ip).version == family}
        assert len(ips) <= MAX_PUBLIC_IPS


@given(ADDRESSES, st.sampled_from([NATED, LOOPBACK, LAN_ONLY, OwnSide()]))
def test_bounds_hold_at_any_site(theirs, own):
    targets, _ = select_targets(own, theirs)
    assert len(targets) <= MAX_TARGETS
    for address in targets:
        assert classify_ip(address[0]) != "forbidden"
        assert address[1] >= 1024 or address[1] in (80, 443)
        assert address not in own.observed + own.local
        if classify_ip(address[0]) == "loopback":
            assert own is LOOPBACK
        if classify_ip(address[0]) == "private":
            assert own in (NATED, LAN_ONLY)


def test_a_peer_behind_our_own_nat_is_dialled_at_its_private_address_first():
    theirs = (("198.51.100.7", 6000), ("192.168.1.3", 6000))
    assert is_same_site(NATED, theirs)
    targets, refused = select_targets(NATED, theirs)
    assert targets == (("192.168.1.3", 6000), ("198.51.100.7", 6000))
    assert not refused


def test_private_addresses_lead_nowhere_from_elsewhere_or_when_nobody_sees_us():
    theirs = (("203.0.113.5", 6000), ("192.168.1.3", 6000))
    for own in (NATED, OwnSide(local=(("192.168.1.2", 5000),))):
        targets, refused = select_targets(own, theirs)
        assert targets == (("203.0.113.5", 6000),)
        assert refused == {("192.168.1.3", 6000): "private address of another site"}


def test_a_mesh_within_one_lan_or_one_machine():
    assert select_targets(LAN_ONLY, [("10.0.0.3", 6000)])[0] == (("10.0.0.3", 6000),)
    assert select_targets(LAN_ONLY, [("127.0.0.1", 6000)])[0] == ()
    assert select_targets(LOOPBACK, [("127.0.0.1", 6000)])[0] == (("127.0.0.1", 6000),)


def test_a_claimed_loopback_address_opens_no_private_one():
    beside_a_lan = OwnSide(LOOPBACK.observed, local=(("192.168.1.2", 5000),))
    theirs = [("127.0.0.1", 6000), ("192.168.1.3", 6000), ("10.0.0.9", 6000)]
    assert select_targets(LOOPBACK, theirs)[0] == (("127.0.0.1", 6000),)
    assert select_targets(beside_a_lan, theirs)[0] == ()


def test_what_we_offer():
    assert NATED.offered() == (("198.51.100.7", 5000), ("192.168.1.2", 5000))
    sequential = OwnSide(
        observed=(("198.51.100.7", 20000), ("198.51.100.7", 20001)),
        facts=NatFacts("address_dependent", port_step=1),
    )
    assert [port for _, port in sequential.offered()] == [20002, 20003, 20004]
    random = OwnSide(
        observed=(("198.51.100.7", 20000), ("198.51.100.7", 4711)),
        facts=NatFacts("address_dependent"),
    )
    assert random.offered() == random.observed
    mixed = OwnSide(observed=NATED.observed, local=(("127.0.0.1", 5000),))
    assert mixed.offered() == NATED.observed


def test_texts_that_are_no_addresses_are_left_out():
    texts = ["example.org:80", "1.2.3.4", "1.2.3.4:99999", "", "[::1]:5", "1.2.3.4:5"]
    assert parse_addresses_untrusted(texts) == (("::1", 5), ("1.2.3.4", 5))
