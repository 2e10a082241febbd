"""The mapper among network changes, strangers and goodbyes."""

import pytest

from fabric.core.errors import RemoteProtocolError
from nat.portmap.api import Lost, Mapped
from nat.portmap.core import Phase, pcp
from nat.portmap.upnp_messages import UpnpFailed
from tests.nat.portmap.portmap_router import (
    GATEWAY,
    OTHER_GATEWAY,
    Home,
    Router,
    upnp_calls,
)


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
        (search,) = upnp_calls(home)
        home.mapper.on_network_change(OTHER_GATEWAY, home.now)
        answer = home.router.call(search.request, home.now)
        home.mapper.on_upnp(search.token, answer, home.now)
        home.mapper.on_timeout(home.now + 1)
        assert home.mapper.phase is Phase.SEARCHING
        assert home.mapper._keeper.upnp_url == ""


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

    def test_a_call_in_flight_does_not_count_as_the_removal(self):
        home = Home(Router(("upnp",)))
        home.mapper.on_network_change(GATEWAY, home.now)
        (search,) = upnp_calls(home)
        found = home.router.call(search.request, home.now)
        home.mapper.on_upnp(search.token, found, home.now)
        home.mapper.on_timeout(home.now + 1)
        (asked,) = upnp_calls(home)
        home.mapper.close(home.now)
        (removal,) = upnp_calls(home)
        home.router.call(asked.request, home.now)  # it was done; its answer is lost
        failed = UpnpFailed(internal_port=4001, reason="killed")
        home.mapper.on_upnp(asked.token, failed, home.now)
        assert not home.mapper.done
        answer = home.router.call(removal.request, home.now)
        home.mapper.on_upnp(removal.token, answer, home.now)
        assert home.mapper.done
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
        pcp.decode_untrusted(home.router.datagram(packet, home.now)),
        pcp.MapAnswer,
    )
    home.mapper.receive_untrusted(home.router.datagram(packet, home.now), home.now)
    assert home.mapper.mappings()[0].method == "nat-pmp"
