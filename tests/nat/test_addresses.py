import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.addresses import (
    MAX_CANDIDATES,
    AddressClass,
    classify,
    endpoint_of,
    public_ips,
    rank_addresses,
    same_site,
    worth_dialling,
)

HOME = ["127.0.0.1/8", "192.168.1.7/24"]
OURS = {"203.0.113.1"}
THEIRS = {"198.51.100.2"}


@pytest.mark.parametrize(
    ("ip", "kind"),
    [
        ("127.3.2.1", "loopback"),
        ("::1", "loopback"),
        ("169.254.9.9", "link_local"),
        ("fe80::1", "link_local"),
        ("fe80::1%eth0", "link_local"),
        ("10.1.2.3", "private"),
        ("172.31.255.255", "private"),
        ("172.32.0.0", "public"),
        ("fd00::1", "private"),
        ("100.64.0.1", "cgnat"),
        ("100.127.255.255", "cgnat"),
        ("100.128.0.0", "public"),
        ("8.8.8.8", "public"),
        ("198.51.100.7", "public"),
        ("2001:db8::1", "public"),
        ("::ffff:10.0.0.1", "private"),
        ("239.1.1.1", "multicast"),
        ("ff02::1", "multicast"),
        ("0.0.0.0", "unusable"),
        ("255.255.255.255", "unusable"),
        ("::", "unusable"),
        ("example.org", "unusable"),
    ],
)
def test_addresses_have_classes(ip, kind):
    assert classify(ip) is AddressClass(kind)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("192.0.2.1:80", ("192.0.2.1", 80)),
        ("[2001:db8::1]:80", ("2001:db8::1", 80)),
        ("/ip4/192.0.2.1/tcp/80", ("192.0.2.1", 80)),
        ("/ip6/2001:db8::1/tcp/80/p2p/12D3KooX", ("2001:db8::1", 80)),
        ("[::ffff:192.0.2.1]:80", ("192.0.2.1", 80)),
        ("/ip4/192.0.2.1/udp/80", None),
        ("/ip4/192.0.2.1/tcp/80/p2p/X/p2p-circuit", None),
        ("/dns4/example.org/tcp/80", None),
        ("192.0.2.1:0", None),
        ("192.0.2.1:65536", None),
        ("192.0.2.1", None),
        ("", None),
    ],
)
def test_both_forms_of_an_address_are_read(text, end):
    found = endpoint_of(text)
    assert found == (end and (ipaddress.ip_address(end[0]), end[1]))


def order(candidates, own=HOME, ours=OURS, theirs=THEIRS):
    return worth_dialling(rank_addresses(candidates, own, ours, theirs))


def test_another_sites_private_addresses_are_dropped_with_the_reason():
    candidates = ["192.168.2.2:1", "10.0.0.5:1", "198.51.100.2:1"]
    ranked = rank_addresses(candidates, HOME, OURS, THEIRS)
    assert worth_dialling(ranked) == ("198.51.100.2:1",)
    assert {r.reason for r in ranked[1:]} == {"private address of another site"}


def test_the_same_network_number_at_another_site_comes_last():
    assert order(["192.168.1.2:1", "198.51.100.2:1"])[-1] == "192.168.1.2:1"


def test_a_shared_router_makes_the_lan_first_and_its_own_address_last():
    candidates = ["203.0.113.1:9", "10.9.0.4:1", "192.168.1.2:1"]
    assert order(candidates, theirs=OURS) == (
        "192.168.1.2:1",
        "10.9.0.4:1",
        "203.0.113.1:9",
    )


def test_without_a_view_from_outside_private_addresses_are_tried_but_not_first():
    got = order(["10.9.0.4:1", "198.51.100.2:1"], ours=(), theirs=())
    assert got == ("198.51.100.2:1", "10.9.0.4:1")


def test_what_neighbours_see_of_us_says_nothing_about_sites():
    got = order(["10.9.0.4:1", "198.51.100.2:1"], ours={"192.168.1.7"})
    assert got == ("198.51.100.2:1", "10.9.0.4:1")


def test_loopback_is_for_daemons_of_one_host():
    assert order(["127.0.0.1:1", "198.51.100.2:1"]) == ("198.51.100.2:1",)
    assert order(["127.0.0.1:1", "192.168.1.7:1"])[0] == "127.0.0.1:1"
    assert order(["/ip4/127.0.0.1/tcp/1"]) == ("/ip4/127.0.0.1/tcp/1",)


def test_a_family_that_we_lack_is_not_dialled():
    assert order(["[2001:db8::1]:1", "198.51.100.2:1"]) == ("198.51.100.2:1",)
    both = [*HOME, "2001:db8:1::2/64"]
    assert len(order(["[2001:db8::1]:1", "198.51.100.2:1"], both)) == 2


def test_a_site_is_shared_when_a_public_address_is():
    assert same_site({"a", "b"}, {"b"}) is True
    assert same_site({"a"}, {"b"}) is False
    assert same_site(set(), {"b"}) is None
    assert public_ips(["8.8.8.8:1", "10.0.0.1:2", "nonsense"]) == {"8.8.8.8"}


ips = st.one_of(st.ip_addresses(), st.ip_addresses(network="192.168.0.0/16"))
addresses = st.one_of(
    st.text(max_size=30),
    st.builds(lambda ip, port: f"[{ip}]:{port}", ips, st.integers(0, 70000)),
)
interfaces = st.lists(ips.map(lambda ip: f"{ip}/24"), max_size=4)
publics = st.sets(ips.map(str), max_size=3)


@pytest.mark.slow
@given(st.lists(addresses, max_size=80), interfaces, publics, publics)
def test_every_candidate_is_judged_once_and_the_useless_come_last(
    candidates, own, ours, theirs
):
    ranked = rank_addresses(candidates, own, ours, theirs)
    unique = list(dict.fromkeys(candidates))[:MAX_CANDIDATES]
    assert sorted(r.address for r in ranked) == sorted(unique)
    worth = [r.worth_a_dial for r in ranked]
    assert worth == sorted(worth, reverse=True)
    assert all(r.reason for r in ranked)
    for each in ranked:
        if each.worth_a_dial:
            kind = classify(endpoint_of(each.address)[0])
            assert kind not in (AddressClass.MULTICAST, AddressClass.UNUSABLE)
