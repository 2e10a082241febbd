"""One machine, one site: what addresses show of them."""

from crdt_store.views import MemberRecord
from fabric.app.domains import NOWHERE, domain_of_record


def record(*addrs, data=()):
    return MemberRecord(name="n", addrs=tuple(addrs), data_addrs=tuple(data))


def site(*addrs, data=()):
    return domain_of_record(record(*addrs, data=data)).site


def host(*addrs, data=()):
    return domain_of_record(record(*addrs, data=data)).host


def test_loopback_alone_is_one_machine():
    assert domain_of_record(record("/ip4/127.0.0.1/tcp/4001/p2p/x")) == (
        NOWHERE,
        NOWHERE,
    )
    assert domain_of_record(record()) == (NOWHERE, NOWHERE)


def test_peers_behind_one_router_share_a_site_and_not_a_machine():
    one = ("/ip4/192.168.1.5/tcp/1", "/ip4/127.0.0.1/tcp/1")
    other = ("/ip4/192.168.1.6/tcp/1",)
    data = ("93.184.216.34:4000",)
    assert site(*one, data=data) == site(*other, data=data)
    assert host(*one, data=data) != host(*other, data=data)
    assert site(*one, data=data) != site(*one, data=("93.184.99.34:4000",))


def test_one_machine_with_two_peers():
    assert host("/ip4/10.0.0.2/tcp/1") == host("/ip4/10.0.0.2/tcp/2")


def test_a_site_of_ipv6_is_its_prefix():
    assert site(data=("[2600:1::5]:400",)) == "260000010000/48"
    assert site("/ip6/2600:1::5/tcp/1") == site("/ip6/2600:1::77/tcp/1")


def test_a_relays_address_says_nothing_of_the_member():
    through = "/ip4/93.184.216.34/tcp/1/p2p/relay/p2p-circuit/p2p/x"
    assert site(through) == NOWHERE
