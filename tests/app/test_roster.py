"""An invite names addresses that reach far, through relays where nothing else does."""

from types import SimpleNamespace

import pytest

from fabric.app.peer_book import PeerBook
from fabric.app.roster import (
    MAX_BOOTSTRAP,
    bootstrap_addrs,
    own_bootstrap,
    reach,
    rendezvous_groups,
)
from fabric.core.ids import PeerId

ME, RELAY = PeerId("me"), PeerId("relay")


def addr(ip, peer=ME):
    version = "ip6" if ":" in ip else "ip4"
    return f"/{version}/{ip}/tcp/4801/p2p/{peer}"


def circuit(relay_ip, peer=ME):
    return f"{addr(relay_ip, RELAY)}/p2p-circuit/p2p/{peer}"


PUBLIC, SIX = addr("198.51.100.7"), addr("2001:db8:1::1")
LAN, LOOP = addr("192.168.1.2"), addr("127.0.0.1")


@pytest.mark.parametrize(
    ("text", "far"),
    [
        (PUBLIC, 0),
        (SIX, 0),
        (f"/dns4/peer.example.org/tcp/4801/p2p/{ME}", 0),
        (circuit("203.0.113.5"), 1),
        (circuit("192.168.1.9"), 2),
        (LAN, 2),
        (addr("100.64.0.2"), 2),
        (addr("169.254.3.4"), 3),
        (LOOP, 4),
        ("/memory/1", 5),
        (addr("0.0.0.0"), 5),
    ],
)
def test_reach(text, far):
    assert reach(text) == far


def test_behind_a_nat_circuits_come_first_and_the_lan_is_not_forgotten():
    own = [
        LOOP,
        LAN,
        circuit("203.0.113.5"),
        circuit("203.0.113.6"),
        circuit("1.1.1.1"),
    ]
    assert own_bootstrap(own) == (own[2], own[3], LAN, LOOP)


def test_with_many_public_addresses_one_of_the_site_stays():
    own = [LAN, *(addr(f"198.51.100.{i}") for i in range(9))]
    found = own_bootstrap(own)
    assert len(found) == 4
    assert LAN in found
    assert found[0] == addr("198.51.100.0")


def test_loopback_alone_is_still_named():
    assert own_bootstrap([LOOP]) == (LOOP,)


def store(**addrs):
    members = {PeerId(p): SimpleNamespace(addrs=tuple(a)) for p, a in addrs.items()}
    return SimpleNamespace(members=SimpleNamespace(all=lambda: members))


def test_members_that_all_can_reach_come_first():
    made = store(
        lan=[addr("10.0.0.1", "lan")],
        nat=[addr("10.0.0.2", "nat"), circuit("203.0.113.5", "nat")],
        wide=[addr("10.0.0.3", "wide"), addr("198.51.100.9", "wide")],
        liar=[PUBLIC, addr("1.1.1.1", "x" * 400)],
        gone=[addr("198.51.100.10", "gone")],
    )
    found = bootstrap_addrs(made, ["lan", "nat", "wide", "liar", "nobody"], [LAN])
    assert found == (
        LAN,
        addr("198.51.100.9", "wide"),
        circuit("203.0.113.5", "nat"),
        addr("10.0.0.1", "lan"),
    )


def test_an_invite_has_a_bound():
    many = {f"p{i}": [addr(f"198.51.100.{i}", f"p{i}")] for i in range(50)}
    assert len(bootstrap_addrs(store(**many), list(many), [LAN])) == MAX_BOOTSTRAP


def test_rendezvous_candidates_by_how_likely_others_share_them():
    book = PeerBook(ME)
    book.learn({PeerId("wide"): [addr("198.51.100.9", "wide")]}, source="record")
    book.learn({PeerId("home"): [addr("10.0.0.9", "home")]}, source="record")
    book.learn({PeerId("rumour"): [addr("198.51.100.8", "rumour")]}, source="mdns")
    groups = rendezvous_groups(
        [addr("198.51.100.1", "configured")],
        [addr("198.51.100.2", "invited")],
        [RELAY],
        book,
    )
    assert groups == ({"configured"}, {"invited"}, {"relay"}, {"wide"})
