"""What the parts of traversal report, as the doctor's facts. Pure.

The parts know more than a person needs, and words of their own; they may change without
the doctor, whose codes are stable.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fabric.core.ids import short
from nat.doctor.facts import (
    MappingKind,
    PortMapping,
    Reachability,
    Refusal,
    Relays,
    Reservation,
)
from nat.portmap.api import Finding, Mapping
from nat.punch.facts import NatFacts
from nat.reachability.core import Reachability as Report
from nat.reachability.observed_mapping import MappingKind as ObservedKind
from nat.relay.circuit import RelayStatus

_OBSERVED: dict[ObservedKind, MappingKind] = {
    "none": "none",
    "endpoint_independent": "endpoint_independent",
    "address_or_port_dependent": "per_destination",
    "unknown": "unknown",
}


def from_report(report: Report) -> Reachability:
    """Return the verdict on our own address."""
    seen = report.mapping
    external = seen.external or ", ".join(seen.external_ips)
    return Reachability(
        verdict=report.status,
        confidence=report.confidence,
        mapping=_OBSERVED[seen.kind],
        sequential=seen.allocation == "sequential",
        external=report.addresses[0] if report.addresses else external,
        num_observers=max(report.agreeing, seen.votes),
        reason=report.reason,
    )


def from_nat_facts(facts: NatFacts) -> Reachability:
    """Return what a peer said of its NAT when it was last punched."""
    kind: MappingKind = "unknown"
    if facts.mapping == "endpoint_independent":
        kind = "endpoint_independent"
    elif facts.mapping == "address_dependent":
        kind = "per_destination"
    return Reachability(
        verdict="public" if facts.public else "unknown",
        mapping=kind,
        sequential=facts.port_step != 0,
    )


def from_mappings(mappings: Sequence[Mapping], finding: Finding) -> PortMapping:
    """Return what the router grants, or why nothing."""
    if not mappings:
        no = Refusal(finding.code, finding.reason, finding.next_step)
        return PortMapping(refusal=no)
    return PortMapping(
        mapped=tuple(f"{m.external_ip}:{m.external_port}" for m in mappings),
        method=mappings[0].method,
        public=any(mapping.is_public for mapping in mappings),
    )


def from_relays(relays: Collection[RelayStatus], wanted: int) -> Relays:
    """Return our reservations, and what the other relays said."""
    return Relays(
        held=tuple(
            Reservation(short(relay.relay), relay.rtt_seconds)
            for relay in relays
            if relay.held
        ),
        wanted=wanted,
        refused=tuple(
            (short(relay.relay), Refusal("E_RELAY", relay.why))
            for relay in relays
            if relay.why and not relay.held
        ),
    )
