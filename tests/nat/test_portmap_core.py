import pytest

from fabric.core.errors import RemoteProtocolError
from nat import portmap_pcp
from nat.gateway import Gateway
from nat.portmap import ANNOUNCED_SECONDS, Phase
from nat.portmap_api import Lost, Mapped
from tests.nat.portmap_router import GATEWAY, OTHER_GATEWAY, Home, Router

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
    home.run(1799)
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


def test_a_method_that_answers_but_maps_nothing_gives_way_to_the_next():
    class Half(Router):
        def _pmp(self, data, now):
            answer = super()._pmp(data, now)
            return answer if data[1] == 0 else answer[:2] + b"\x00\x02" + answer[4:]

    home = Home(Half(("nat-pmp", "upnp")))
    home.join()
    home.run(1)
    assert [m.method for m in home.mapper.mappings()] == ["upnp"]
    home.leave()
    assert home.router.held(home.now) == {}


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


class TestNetworkChange:
    def test_another_gateway_loses_all_and_maps_again(self):
        home = Home(Router())
        home.join()
        first = home.mapper._keeper.first.nonce
        home.join(OTHER_GATEWAY)
        lost = [event for event in home.events if isinstance(event, Lost)]
        assert [event.reason for event in lost] == ["the network changed"]
        assert home.mapped() == {4001: 4001}
        assert home.mapper._keeper.first.nonce != first

    def test_the_same_gateway_confirms(self):
        home = Home(Router(("nat-pmp",)))
        home.join()
        home.run(1)
        home.router.restart(home.now)
        home.join()
        assert home.router.held(home.now) == {4001: 4001}
        assert len([e for e in home.events if isinstance(e, Mapped)]) == 1

    @pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
    def test_another_router_with_the_same_address_confirms_nothing(self, method):
        home = Home(Router((method,)))
        home.join()
        home.run(1)
        home.router.speaks.clear()
        home.join()
        home.run(home.config.search_seconds + 1)
        assert home.mapped() == home.told() == {}

    def test_no_gateway_and_back(self):
        home = Home(Router())
        home.join()
        home.join(None)
        assert home.told() == {}
        home.join()
        assert home.mapped() == {4001: 4001}

    def test_late_upnp_answers_of_the_old_network_are_ignored(self):
        home = Home(Router(("upnp",)))
        home.mapper.on_network_change(GATEWAY, home.now)
        (search,) = [
            command
            for command in home.mapper.take_commands()
            if hasattr(command, "token")
        ]
        home.mapper.on_network_change(None, home.now, "gone")
        answer = home.router.call(search.request, home.now)
        home.mapper.on_upnp(search.token, answer, home.now)
        assert home.mapper.phase is Phase.IDLE


class TestStrangers:
    def test_a_wrong_nonce_is_refused(self):
        home = Home(Router(("pcp",)))
        home.mapper.on_network_change(GATEWAY, home.now)
        packet = home.mapper.take_commands()[0].data
        forged = bytearray(home.router.datagram(packet, home.now))
        forged[24] ^= 1
        with pytest.raises(RemoteProtocolError):
            home.mapper.receive_untrusted(bytes(forged), home.now)
        assert home.mapped() == {}

    def test_answers_to_nothing_are_refused(self):
        home = Home(Router(("pcp",)))
        home.join()
        unasked = bytes.fromhex("00820000000000070fa10fa200000078")
        with pytest.raises(RemoteProtocolError):
            home.mapper.receive_untrusted(unasked, home.now)
        address = bytes.fromhex("0080000000000007c6336401")
        home.mapper.receive_untrusted(address, home.now)
        assert home.mapper.mappings()[0].external_ip == "198.51.100.1"

    def test_duplicates_change_nothing(self):
        home = Home(Router(("pcp",)))
        home.join()
        lease = home.mapper._keeper.first
        packet = home.mapper._keeper.encode(lease, "pcp", lifetime=None)
        answer = home.router.datagram(packet, home.now)
        before = lease.expires_at
        home.mapper.receive_untrusted(answer, home.now + 60)
        assert lease.expires_at == before

    def test_announcements_must_be_announcements(self):
        home = Home(Router(("pcp",)))
        home.join()
        for data in (b"", b"\x02", b"x" * 24, bytes(1200)):
            with pytest.raises(RemoteProtocolError):
                home.mapper.on_announcement_untrusted(data, home.now)


class TestLeaving:
    def test_a_mute_router_is_left_in_time(self):
        home = Home(Router(("pcp",)), close_seconds=3.0)
        home.join()
        home.lossy = True
        start = home.now
        home.leave()
        assert home.now - start == pytest.approx(3.0)
        assert home.told() == {}

    def test_leaving_while_searching_removes_what_was_asked_for(self):
        home = Home(Router(("pcp",)))
        home.mapper.on_network_change(GATEWAY, home.now)
        for command in home.mapper.take_commands():
            if not hasattr(command, "token"):
                home.router.datagram(command.data, home.now)  # the answer is lost
        assert home.router.held(home.now) == {4001: 4001}
        home.leave()
        assert home.router.held(home.now) == {}

    def test_nothing_is_asked_for_afterwards(self):
        home = Home(Router())
        home.join()
        home.leave()
        home.mapper.on_network_change(OTHER_GATEWAY, home.now)
        home.mapper.on_timeout(home.now + 1e6)
        assert home.mapper.take_commands() == []
        assert home.mapper.done


def test_a_pcp_answer_that_comes_after_the_choice_is_not_an_error():
    home = Home(Router(("nat-pmp",)))
    home.join()
    lease = home.mapper._keeper.first
    home.router.speaks.add("pcp")
    packet = home.mapper._keeper.encode(lease, "pcp", lifetime=None)
    assert isinstance(
        portmap_pcp.decode_untrusted(home.router.datagram(packet, home.now)),
        portmap_pcp.MapAnswer,
    )
    home.mapper.receive_untrusted(home.router.datagram(packet, home.now), home.now)
    assert home.mapper.mappings()[0].method == "nat-pmp"
