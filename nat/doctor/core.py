"""The doctor: facts in, findings out. Pure; the order is that of a person's questions.

    the machine   clock, listen, firewall, udp, ipv6
    the network   reachability, nat, port-mapping, relay, relaying, mtu
    the mesh      bootstraps, members, rendezvous, mdns, peers-file, bandwidth, versions
    one peer      member, addresses, gate, admission, nat, relay, punch, path

"fail" is what keeps this peer from working; "warn" is what makes it slower, or what is
not known. Every line that is not "ok" says what to do. Codes and names are stable.
"""

from __future__ import annotations

from nat.doctor import machine as machine
from nat.doctor import mesh as mesh
from nat.doctor import network as network
from nat.doctor.facts import Facts
from nat.doctor.findings import Finding
from nat.doctor.peer import diagnose_peer

CHECKS = (
    machine.clock,
    machine.listen,
    machine.firewall,
    machine.udp,
    machine.ipv6,
    network.reachability,
    network.nat,
    network.port_mapping,
    network.relay,
    network.relaying,
    network.mtu,
    mesh.bootstraps,
    mesh.members,
    mesh.rendezvous,
    mesh.mdns,
    mesh.remembered,
    mesh.links,
    mesh.versions,
)


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """Return a finding for each thing that can keep peers from connecting."""
    general = tuple(check(facts) for check in CHECKS)
    return general if facts.peer is None else general + diagnose_peer(facts.peer, facts)
