"""The reports of the parts, as the doctor tells them."""

from typing import get_args

import pytest

from fabric.core.ids import PeerId
from nat.doctor.core import diagnose
from nat.doctor.facts import Facts
from nat.doctor.sources import (
    from_mappings,
    from_nat_facts,
    from_relays,
    from_report,
)
from nat.portmap.api import Finding, Mapping
from nat.punch.facts import NatFacts
from nat.reachability.core import Reachability
from nat.reachability.observed_mapping import Mapping as Observed
from nat.reachability.observed_mapping import MappingKind
from nat.relay.circuit import RelayStatus


def line(name, **facts):
    return next(f for f in diagnose(Facts(**facts)) if f.name == name)


@pytest.mark.parametrize("kind", get_args(MappingKind))
def test_every_mapping_that_observers_find_has_a_line(kind):
    report = Reachability(
        status="private",
        confidence="medium",
        agreeing=2,
        reason="2 of 2 could not",
        mapping=Observed(kind=kind, external_ips=("203.0.113.9",), votes=2),
    )
    told = from_report(report)
    assert line("reachability", reachability=told).detail.startswith(
        "private, medium confidence (2 of 2 could not)"
    )
    code = line("nat", reachability=told).code
    assert code == {
        "address_or_port_dependent": "E_NAT_SYMMETRIC",
        "unknown": "E_NOT_MEASURED",
    }.get(kind, "OK")


def test_a_public_report_names_the_address():
    report = Reachability(
        status="public", confidence="high", addresses=("/ip4/203.0.113.9/tcp/1",)
    )
    assert (
        "public at 203.0.113.9:1,"
        in line("reachability", reachability=from_report(report)).detail
    )


def test_what_a_peer_says_of_its_nat():
    assert from_nat_facts(NatFacts()).mapping == "unknown"
    hard = from_nat_facts(NatFacts(mapping="address_dependent", port_step=2))
    assert (hard.mapping, hard.sequential) == ("per_destination", True)
    easy = from_nat_facts(NatFacts(mapping="endpoint_independent", public=True))
    assert (easy.mapping, easy.verdict) == ("endpoint_independent", "public")


def test_the_routers_own_finding_is_told():
    finding = Finding(
        code="E_NO_GATEWAY", level="warn", reason="no router", next_step="plug it in"
    )
    none = line("port-mapping", port_mapping=from_mappings((), finding))
    assert (none.code, none.detail, none.next_step) == (
        "E_NO_GATEWAY",
        "no router",
        "plug it in",
    )
    mapping = Mapping(
        internal_port=1,
        external_ip="100.64.0.9",
        external_port=2,
        method="upnp",
        lease_seconds=60,
    )
    double = line("port-mapping", port_mapping=from_mappings((mapping,), finding))
    assert double.code == "E_MAPPING_PRIVATE"


def test_relays_that_hold_a_slot_and_that_refuse():
    relays = [
        RelayStatus(
            relay=PeerId("x" * 44 + "relay-01"),
            held=True,
            rtt_seconds=0.02,
            data=True,
            why="",
        ),
        RelayStatus(
            relay=PeerId("x" * 44 + "relay-02"),
            held=False,
            rtt_seconds=None,
            data=False,
            why="it is full",
        ),
    ]
    found = line("relay", relays=from_relays(relays, 2))
    assert found.code == "E_RELAY_FEW"
    assert "slot at relay-01 20 ms only" in found.detail
    assert "relay-02: E_RELAY it is full" in found.detail
