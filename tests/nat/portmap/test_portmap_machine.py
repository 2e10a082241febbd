"""Any order of events: the mapper believes only what it was granted and renews it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.core.errors import RemoteProtocolError
from nat.portmap.core import Phase
from tests.nat.portmap.portmap_router import GATEWAY, OTHER_GATEWAY, Home, Router

pytestmark = pytest.mark.slow

METHODS = ("pcp", "nat-pmp", "upnp")
ANNOUNCEMENT = bytes([2, 0x80]) + bytes(22)


class PortMapping(RuleBasedStateMachine):
    @initialize(
        speaks=st.sets(st.sampled_from(METHODS)),
        num_ports=st.integers(1, 3),
        lease=st.sampled_from([10, 60, 3600]),
        seed=st.integers(0, 2**16),
    )
    def begin(self, speaks, num_ports, lease, seed):
        self.router = Router(speaks)
        self.home = Home(
            self.router,
            ports=tuple(range(4001, 4001 + num_ports)),
            seed=seed,
            lease_seconds=lease,
        )
        self.undisturbed_since = self.home.now
        self.home.join()

    def disturbed(self):
        self.undisturbed_since = self.home.now

    @rule(seconds=st.sampled_from([0.1, 1.0, 7.0, 31.0, 400.0, 4000.0]))
    def wait(self, seconds):
        self.home.run(seconds)

    @rule(method=st.sampled_from(METHODS))
    def firmware_changes(self, method):
        self.router.speaks ^= {method}
        self.disturbed()

    @rule(seconds=st.sampled_from([1.0, 20.0, 50.0, 2000.0, 4000.0]))
    def link_is_down(self, seconds):
        self.home.lossy = True
        self.home.run(seconds)
        self.nothing_is_held_beyond_its_life_or_without_a_plan()
        self.home.lossy = False
        self.disturbed()

    @rule(refuses=st.booleans())
    def administrator(self, refuses):
        self.router.refuses = refuses
        self.disturbed()

    @rule(port=st.integers(4001, 4003), mapless=st.booleans())
    def firmware_has_a_bug(self, port, mapless):
        self.router.refused_ports ^= {port}
        self.router.mapless = mapless
        self.disturbed()

    @rule()
    def router_restarts(self):
        self.router.restart(self.home.now)
        self.disturbed()

    @rule()
    def router_restarts_aloud(self):
        self.router.restart(self.home.now)
        self.home.mapper.on_announcement_untrusted(ANNOUNCEMENT, self.home.now)
        self.disturbed()

    @rule(host=st.integers(2, 4), port=st.integers(4001, 4003))
    def neighbour_takes(self, host, port):
        taken = self.router.table.get(port)
        if taken is None:
            self.router.table[port] = (f"192.168.1.{host}", port, 1e18)

    @rule(address=st.sampled_from(["198.51.100.9", "100.64.0.1", "0.0.0.0"]))
    def provider_renumbers(self, address):
        self.router.external_ip = address
        self.disturbed()

    @rule(gateway=st.sampled_from([GATEWAY, OTHER_GATEWAY, None]))
    def network_changes(self, gateway):
        self.home.join(gateway)
        self.disturbed()

    @rule()
    def port_closed(self):
        self.home.mapper.on_unreachable(self.home.now)
        self.home.settle()
        self.disturbed()

    @rule(data=st.binary(max_size=80), announced=st.booleans())
    def garbage(self, data, announced):
        mapper = self.home.mapper
        door = (
            mapper.on_announcement_untrusted if announced else mapper.receive_untrusted
        )
        try:
            door(data, self.home.now)
        except RemoteProtocolError:
            return
        self.home.settle()
        self.disturbed()

    @invariant()
    def events_tell_the_same_as_the_state(self):
        places = {
            m.internal_port: (m.external_ip, m.external_port)
            for m in self.home.mapper.mappings()
        }
        assert self.home.told() == places

    @invariant()
    def nothing_is_held_beyond_its_life_or_without_a_plan(self):
        now = self.home.now
        for lease in self.home.mapper._keeper.leases.values():
            if lease.mapping is not None:
                assert now <= self.home.proven[lease.internal_port] + 0.001
                assert self.home.mapper.phase is Phase.MAPPING
                assert lease.pending or lease.renew_at < lease.expires_at + 1800
        if self.home.mapper.phase is not Phase.IDLE:
            assert self.home.mapper.next_timeout() < now + 3600

    @invariant()
    def on_a_calm_network_belief_is_the_routers_table(self):
        """Lasting belief in a mapping the router lacks is the failure that hurts."""
        calm = self.home.now - self.undisturbed_since
        if calm >= 4000 and not self.router.refuses:
            held = self.router.held(self.home.now)
            for internal, external in self.home.mapped().items():
                assert held.get(internal) == external

    def teardown(self):
        """Whatever happened, a router that works maps everything, then nothing."""
        if not hasattr(self, "home"):
            return
        home, router = self.home, self.router
        router.refuses = router.mapless = False
        router.refused_ports.clear()
        router.speaks |= {"nat-pmp"}
        router.external_ip = "198.51.100.1"
        home.join(GATEWAY)
        home.run(2 * 1800 + 700)
        wanted = set(home.mapper._keeper.leases)
        assert set(home.mapped()) == wanted
        assert home.mapped() == router.held(home.now)
        home.leave()
        assert router.held(home.now) == home.told() == {}
        assert home.mapper.take_commands() == []


PortMapping.TestCase.settings = settings(max_examples=120, stateful_step_count=30)
TestPortMapping = PortMapping.TestCase
