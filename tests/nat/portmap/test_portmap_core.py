import pytest

from nat.portmap.api import Lost, Mapped
from nat.portmap.core import ANNOUNCED_SECONDS, Phase
from nat.portmap.gateway import Gateway
from tests.nat.portmap.portmap_router import GATEWAY, Home, Router, upnp_calls

ANNOUNCEMENT = bytes([2, 0x80]) + bytes(22)


def code(home):
    home.settle()
    return home.mapper.finding().code


@pytest.mark.parametrize(
    ("speaks", "method"),
    [
        (("pcp", "nat-pmp", "upnp"), "pcp"),
        (("nat-pmp", "upnp"), "nat-pmp"),
        (("nat-pmp",), "nat-pmp"),
        (("upnp",), "upnp"),
        (("pcp",), "pcp"),
    ],
)
def test_the_best_method_that_works_is_used(speaks, method):
    home = Home(Router(speaks, external_ip="8.8.4.4"), ports=(4001, 4002))
    home.join()
    home.run(2)
    assert home.mapped() == {4001: 4001, 4002: 4002}
    assert {m.method for m in home.mapper.mappings()} == {method}
    assert home.told() == {4001: ("8.8.4.4", 4001), 4002: ("8.8.4.4", 4002)}
    assert code(home) == "MAPPED"


def test_a_silent_router_is_reported_with_what_to_do_and_asked_again_less_often():
    home = Home(Router(()), ports=(4001, 4002))
    home.join()
    home.run(9)
    finding = home.mapper.finding()
    assert finding.code == "E_MAP_REFUSED"  # UPnP says no answer, the others nothing
    assert "192.168.1.1 maps no port (UPnP: no answer" in finding.reason
    assert "forward TCP ports 4001 and 4002 to 192.168.1.7" in finding.next_step
    first = home.sent
    home.run(300)
    early = home.sent - first
    home.run(24 * 3600)
    assert 0 < home.sent - first - early < 24 * 2.5 * 10  # one search in half an hour
    home.router.speaks.add("nat-pmp")
    home.run(2100)
    assert home.mapped() == {4001: 4001, 4002: 4002}


def test_no_answer_at_all_has_its_own_code():
    home = Home(Router(()), methods=("pcp", "nat-pmp"))
    home.join()
    home.run(9)
    assert code(home) == "E_MAP_NO_ANSWER"
    assert "neither PCP, NAT-PMP nor UPnP" in home.mapper.finding().reason


def test_a_closed_port_ends_the_wait_at_once():
    home = Home(Router(()), methods=("pcp", "nat-pmp"))
    home.join()
    home.mapper.on_unreachable(home.now)
    assert code(home) == "E_MAP_REFUSED"
    assert "port 5351 is closed" in home.mapper.finding().reason


def test_without_a_gateway_the_reason_is_given():
    home = Home(Router())
    home.mapper.on_network_change(None, home.now, "no default route")
    assert code(home) == "E_MAP_NO_GATEWAY"
    assert home.mapper.next_timeout() == float("inf")
    home.leave()


def test_a_public_address_needs_no_mapping():
    home = Home(Router())
    home.join(Gateway(address="8.8.8.1", interface="eth0", source="8.8.8.8"))
    assert code(home) == "MAP_NOT_NEEDED"
    assert home.sent == 0


def test_ipv6_is_asked_by_pcp_alone():
    home = Home(Router(external_ip="2001:db8::7"))
    home.join(Gateway(address="fe80::1", interface="eth0", source="2001:db8::7"))
    assert home.sent == 2  # the question, and the request of the method that won
    assert home.mapper.mappings()[0].external_ip == "2001:db8::7"


@pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
def test_leases_are_renewed_and_removed(method):
    home = Home(Router((method,)), ports=(4001, 4002), lease_seconds=60)
    home.join()
    home.run(2)
    for _ in range(100):
        home.run(7)
        assert home.router.held(home.now) == home.mapped() == {4001: 4001, 4002: 4002}
    assert [type(event) for event in home.events].count(Mapped) == 2  # and no Lost
    home.leave()
    assert home.router.held(home.now) == home.mapped() == {}
    assert home.told() == {}


@pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
def test_a_restarted_router_is_told_again_within_the_refresh(method):
    home = Home(Router((method,)), ports=(4001, 4002), refresh_seconds=300.0)
    home.join()
    home.run(1000)
    home.router.restart(home.now)
    home.run(312)
    assert home.router.held(home.now) == {4001: 4001, 4002: 4002}


@pytest.mark.parametrize("method", ["pcp", "nat-pmp"])
def test_one_answer_with_a_young_epoch_renews_all_ports(method):
    ports = tuple(range(4001, 4009))
    home = Home(Router((method,)), ports=ports, lease_seconds=3600)
    home.join()
    home.run(1300)  # the next renewals are 500 s away
    home.router.restart(home.now)
    home.mapper._keeper.ask(home.mapper._keeper.leases[4003], home.now)
    home.settle()
    home.run(ANNOUNCED_SECONDS)
    assert set(home.router.held(home.now)) == set(ports)


def test_an_announced_restart_is_healed_in_seconds_and_forgeries_are_cheap():
    home = Home(Router(("pcp",)))
    home.join()
    home.run(60)
    home.router.restart(home.now)
    home.mapper.on_announcement_untrusted(ANNOUNCEMENT, home.now)
    home.run(3)
    assert home.router.held(home.now) == {4001: 4001}
    before = home.sent
    for _ in range(1000):
        home.mapper.on_announcement_untrusted(ANNOUNCEMENT, home.now)
        home.run(0.1)
    assert home.sent - before <= 100 / ANNOUNCED_SECONDS + 1


def test_forged_announcements_cannot_make_a_mute_router_be_asked_all_the_time():
    home = Home(Router(()))
    home.join()
    home.run(20)
    before = home.sent
    for _ in range(1000):
        home.mapper.on_announcement_untrusted(ANNOUNCEMENT, home.now)
        home.run(0.1)
    assert home.sent - before <= (100 / ANNOUNCED_SECONDS + 1) * 10


def test_a_router_that_stops_answering_loses_the_mapping_when_the_lease_ends():
    home = Home(Router(("nat-pmp",)), lease_seconds=60)
    home.join()
    home.run(1)
    home.lossy = True
    home.run(50)
    assert home.mapped() == {4001: 4001}
    home.run(40)
    assert home.mapped() == home.told() == {}
    lost = [event for event in home.events if isinstance(event, Lost)]
    assert lost[0].reason == "the router did not renew it"
    home.lossy = False
    home.run(120)
    assert home.mapped() == {4001: 4001}


def test_when_the_lease_ends_another_method_is_looked_for():
    home = Home(Router(("nat-pmp",)), lease_seconds=60)
    home.join()
    home.run(1)
    home.router.speaks = {"upnp"}
    home.run(60 + home.config.search_seconds + 1)
    assert [m.method for m in home.mapper.mappings()] == ["upnp"]


def test_one_upnp_call_a_port_is_in_flight():
    home = Home(Router(("upnp",)))
    home.join()
    home.run(1)
    for _ in range(100):
        home.mapper.on_network_change(GATEWAY, home.now)
    assert len(upnp_calls(home)) == 1


def test_a_method_that_answers_but_maps_nothing_gives_way_to_the_next():
    home = Home(Router(("nat-pmp", "upnp")))
    home.router.mapless = True
    home.join()
    home.run(home.config.search_seconds + 2)
    assert [m.method for m in home.mapper.mappings()] == ["upnp"]
    home.leave()
    assert home.router.held(home.now) == {}


def test_one_refused_port_is_reported_and_asked_for_again():
    for method in ("pcp", "nat-pmp", "upnp"):
        home = Home(Router((method,), external_ip="8.8.4.4"), ports=(4001, 4002))
        home.router.refused_ports.add(4002)
        home.join()
        home.run(2)
        assert home.mapped() == {4001: 4001}
        assert code(home) == "E_MAP_PARTIAL"
        home.router.refused_ports.clear()
        home.run(1800)
        assert home.mapped() == {4001: 4001, 4002: 4002}
        assert code(home) == "MAPPED"


def test_refusals_are_reported_by_method():
    home = Home(Router())
    home.router.refuses = True
    home.join()
    home.run(9)
    reason = home.mapper.finding().reason
    assert "PCP: NOT_AUTHORIZED" in reason
    assert "NAT-PMP: NOT_AUTHORIZED" in reason
    assert "UPnP: Action not authorized" in reason
    assert home.mapper.phase is Phase.RESTING


def test_another_external_port_is_taken_when_the_router_grants_one():
    home = Home(Router(("pcp",)))
    home.router.take_by_other(4001)
    home.join()
    assert home.mapped() == {4001: 4002}


def test_upnp_conflicts_end_at_a_free_port_or_a_refusal():
    home = Home(Router(("upnp",)), ports=(4001, 4002))
    home.router.take_by_other(4001)
    home.join()
    home.run(1)
    mapped = home.mapped()
    assert mapped[4002] == 4002
    assert mapped[4001] >= 10240
    home.leave()

    class Full(Router):
        def _holder(self, external, now):
            return ("192.168.1.99", 1)

    home = Home(Full(("upnp",)))
    home.join()
    home.run(9)
    assert "9 external ports are taken" in home.mapper.finding().reason
    assert home.sent < 30


def test_a_double_nat_is_mapped_and_said_to_be_not_public():
    home = Home(Router(("pcp",), external_ip="100.64.3.2"))
    home.join()
    assert not home.mapper.mappings()[0].is_public
    assert code(home) == "E_MAP_NOT_PUBLIC"


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "224.0.0.1"])
def test_an_impossible_external_address_is_no_mapping(address):
    for method in ("pcp", "nat-pmp"):
        home = Home(Router((method,), external_ip=address), methods=(method,))
        home.join()
        home.run(9)
        assert home.mapped() == {}
        assert code(home) == "E_MAP_REFUSED"


def test_a_new_external_address_is_told():
    for method in ("pcp", "nat-pmp", "upnp"):
        home = Home(Router((method,)), lease_seconds=60)
        home.join()
        home.run(1)
        home.router.external_ip = "198.51.100.2"
        home.run(62)
        assert home.told() == {4001: ("198.51.100.2", 4001)}


def test_tiny_leases_are_refused_and_huge_ones_cut():
    home = Home(Router(("pcp",)))
    home.router.max_lease = 3
    home.join()
    home.run(20)
    assert home.mapped() == {}
    assert "a lease of 3 s is too short" in home.mapper.finding().reason
    home = Home(Router(("pcp",)), lease_seconds=2**31)
    home.join()
    assert home.mapper.mappings()[0].lease_seconds == 24 * 3600
