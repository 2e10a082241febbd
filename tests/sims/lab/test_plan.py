"""Topologies that make sense, and the commands they become."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import ConfigError
from sims.lab.nat_rules import rules_of
from sims.lab.plan import Script, build_site, build_switch, public_address
from sims.lab.topology import (
    MAX_SITES,
    IpVersions,
    NatKind,
    Shape,
    Site,
    Topology,
)

SITES = st.lists(
    st.builds(
        Site,
        name=st.integers(0, 10**6).map(lambda n: f"s{n}"),
        kind=st.sampled_from(NatKind),
        hosts=st.just(1),
        shape=st.builds(
            Shape,
            rate_mbit=st.sampled_from([0.0, 10.0]),
            delay_seconds=st.sampled_from([0.0, 0.01]),
        ),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda site: site.name,
)


def steps_of(sites):
    script = Script("lab.test.")
    build_switch(script)
    for number, site in enumerate(sites, 1):
        build_site(script, site, number)
    return script.steps()


@given(sites=SITES)
def test_a_namespace_exists_before_it_is_used(sites):
    made = set()
    for step in steps_of(sites):
        for line in step.stdin.splitlines():
            if line.startswith("netns add "):
                made.add(line.split()[2])
        used = {word for word in step.argv if word.startswith("lab.test.")}
        assert used <= made


@given(sites=SITES)
def test_addresses_and_device_names_are_unique(sites):
    steps = steps_of(sites)
    lines = [line for step in steps for line in step.stdin.splitlines()]
    public = [line.split()[2] for line in lines if line.startswith("addr add 80.80")]
    assert len(set(public)) == len(public) == len(sites)
    for name in (line.split()[2] for line in lines if line.startswith("link add ")):
        assert len(name) < 16  # IFNAMSIZ


@pytest.mark.parametrize("number", [1, MAX_SITES])
def test_public_addresses_are_public(number):
    assert ipaddress.ip_address(public_address(number)).is_global


@pytest.mark.parametrize("kind", NatKind)
def test_rules_close_what_they_open(kind):
    rules = rules_of(kind.behaviour)
    assert rules.count("{") == rules.count("}")
    assert ("reject with tcp reset" in rules) == kind.behaviour.resets


@pytest.mark.parametrize(
    "sites",
    [
        (),
        (Site(name="a"), Site(name="a")),
        (Site(name="a", hosts=2),),
        (Site(name="a", kind=NatKind.CONE, hosts=0),),
        (Site(name="a.b"),),
        tuple(Site(name=f"s{i}") for i in range(MAX_SITES + 1)),
    ],
)
def test_what_cannot_be_built_is_refused(sites):
    with pytest.raises(ConfigError):
        Topology(sites=sites).check()


def test_names_are_looked_up():
    home = Site(name="home", kind=NatKind.CONE, hosts=2)
    topology = Topology(sites=(Site(name="relay"), home))
    assert topology.site_of("home-1") is home
    assert topology.number("home") == 2
    for look in (topology.site, topology.site_of):
        with pytest.raises(ConfigError):
            look("nobody")


@given(sites=SITES, net6=st.sampled_from(["2001:db8", "fd00:1ab"]))
def test_ipv6_is_where_it_is_wanted_and_each_address_once(sites, net6):
    with_ip6 = [
        Site(name=site.name, kind=site.kind, ip=IpVersions.BOTH)
        for site in sites
        if site.kind.behaviour.layers < 2
    ]
    without = [site for site in sites if site.kind.behaviour.layers > 1]
    topology = Topology(sites=(*with_ip6, *without), net6=net6)
    topology.check()
    script = Script("lab.test.", net6)
    build_switch(script, ip6=topology.has_ip6)
    for number, site in enumerate(topology.sites, 1):
        build_site(script, site, number)
    lines = [line for step in script.steps() for line in step.stdin.splitlines()]
    found = [line.split()[2] for line in lines if line.startswith(f"addr add {net6}")]
    assert len(set(found)) == len(found)
    # the switch, each host, and both sides of each gateway
    gateways = sum(site.kind.behaviour.layers for site in with_ip6)
    assert len(found) == bool(with_ip6) + len(with_ip6) + 2 * gateways
    assert all(ipaddress.ip_interface(address).version == 6 for address in found)


def test_ipv6_that_no_gateway_can_pass_is_refused():
    for kind, ip in ((NatKind.CGNAT, IpVersions.BOTH), (NatKind.CONE, IpVersions.V6)):
        with pytest.raises(ConfigError):
            Topology(sites=(Site(name="a", kind=kind, ip=ip),)).check()
