"""What the parts of traversal report, as the doctor's facts. Pure.

The parts know more than a person needs, and words of their own; they may change without
the doctor, whose codes are stable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from fabric.core.ids import PeerId, short
from fabric.net.offers import format_address
from nat.addresses import AddressClass, endpoint_of
from nat.discovery.core import Islands
from nat.discovery.mdns_service import MdnsReport
from nat.doctor.facts import (
    CircuitTried,
    MappingKind,
    Mdns,
    PortMapping,
    Punched,
    Reachability,
    Refusal,
    Relays,
    Rendezvous,
    Reservation,
    Scope,
)
from nat.history import Outcome, PeerHistory
from nat.portmap.api import Finding, Mapping
from nat.portmap.explain import NOT_NEEDED
from nat.punch.facts import FAILED, NatFacts
from nat.reachability.core import Reachability as Report
from nat.reachability.observed_mapping import MappingKind as ObservedKind
from nat.relay.circuit import RelayStatus

_OBSERVED: dict[ObservedKind, MappingKind] = {
    "none": "none",
    "endpoint_independent": "endpoint_independent",
    "address_or_port_dependent": "per_destination",
    "unknown": "unknown",
}
_SCOPES: dict[AddressClass, Scope] = {
    AddressClass.PUBLIC: "internet",
    AddressClass.LOOPBACK: "host",
}


def from_report(report: Report) -> Reachability:
    """Return the verdict on our own address."""
    seen = report.mapping
    external = seen.external or ", ".join(seen.external_ips)
    return Reachability(
        verdict=report.status,
        confidence=report.confidence,
        scope=_SCOPES.get(report.scope, "site"),
        mapping=_OBSERVED[seen.kind],
        sequential=seen.allocation == "sequential",
        external=_plain(report.addresses[0]) if report.addresses else external,
        num_observers=max(report.agreeing, seen.votes),
        reason=report.reason,
    )


def _plain(multiaddr: str) -> str:
    end = endpoint_of(multiaddr)
    return multiaddr if end is None else format_address(str(end[0]), end[1])


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


def from_circuits(history: PeerHistory, now: float) -> tuple[CircuitTried, ...]:
    """Return the relays that were tried towards a peer, the latest first."""
    return tuple(
        CircuitTried(short(relay), _refusal(ended), ended.seconds, now - ended.at)
        for relay, ended in reversed(history.circuits.items())
    )


def from_punch(
    history: PeerHistory | None, still_relayed: str, now: float
) -> Punched | None:
    """Return what the last punch with a peer came to, or None if there was none.

    Args:
        history: What was tried; of the two planes, that of the data counts first.
        still_relayed: Why the connection is on a relay, as whoever upgrades it says.
        now: Monotonic seconds.
    """
    punches = {} if history is None else history.punches
    record = punches.get("data") or punches.get("control")
    said = Refusal(FAILED, still_relayed) if still_relayed else None
    if record is None:
        return Punched(refusal=said) if said else None
    ended = record.outcome
    return Punched(
        seconds=ended.seconds,
        endpoints=tuple(format_address(*each) for each in record.endpoints),
        attempts=record.tries,
        age_seconds=now - ended.at,
        refusal=_refusal(ended) or said,
    )


def _refusal(ended: Outcome) -> Refusal | None:
    if ended.worked:
        return None
    return Refusal(ended.code, ended.reason, ended.next_step)


def from_islands(
    islands: Islands, name_of: Callable[[PeerId], str], members: Collection[PeerId]
) -> Rendezvous:
    """Return how the mesh looks from the rendezvous points.

    Args:
        islands: What discovery knows; strangers may have registered too.
        name_of: How people call a peer.
        members: Who belongs to the mesh.
    """
    apart = tuple(peer for peer in islands.unconnected if peer in members)
    seen = msgspec.structs.replace(islands, unconnected=apart)
    return Rendezvous(
        sentence=seen.sentence,
        registered=sum(point.registered for point in islands.points),
        failed=tuple(
            (name_of(point.point), point.error)
            for point in islands.points
            if not point.registered
        ),
        unconnected=tuple(sorted(map(name_of, apart))),
    )


def from_mdns(report: MdnsReport) -> Mdns:
    """Return how it stands with the local network."""
    return Mdns(
        state=report.state,
        reason=report.reason,
        next_step=report.next_step,
        heard=report.heard,
    )


def from_mappings(mappings: Sequence[Mapping], finding: Finding) -> PortMapping:
    """Return what the router grants, or why nothing."""
    if not mappings:
        no = Refusal(finding.code, finding.reason, finding.next_step)
        return PortMapping(refusal=no, needless=finding.code == NOT_NEEDED)
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
