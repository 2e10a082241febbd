"""What the doctor says of the network: NAT, port mapping, relay, MTU."""

from __future__ import annotations

from nat.doctor.facts import Facts, Members, Relays, Scope
from nat.doctor.findings import (
    RELAY_STEP,
    Finding,
    counted,
    fail,
    listed,
    milliseconds,
    not_measured,
    ok,
    rate,
    warn,
)

MIN_MTU_BYTES = 1280
"""What every IPv6 link carries (RFC 8200 section 5); below it a tunnel is wrong."""


_SCOPES: dict[Scope, str] = {
    "internet": "internet",
    "site": "network",
    "host": "machine",
}


def reachability(facts: Facts) -> Finding:
    """Judge whether others reach us without help."""
    name, reach = "reachability", facts.reachability
    if reach is None:
        return not_measured(name, "connect with public members: they dial back")
    said = f" ({reach.reason})" if reach.reason else ""
    sure = f"{reach.confidence} confidence"
    if reach.verdict == "public":
        at = reach.external or "all addresses"
        if reach.open_to_the_internet:
            return ok(name, f"public at {at}, {sure}{said}")
        from_where = f"from this {_SCOPES[reach.scope]}, {sure}{said}"
        return ok(name, f"open at {at} {from_where}; nobody outside it was asked")
    if reach.verdict == "private":
        return ok(name, f"private, {sure}{said}: others reach us by punching or relay")
    return warn(
        name,
        "E_REACHABILITY_UNKNOWN",
        f"unknown, {counted(reach.num_observers, 'observer')}{said}",
        "wait for two members outside this network, or start a public one",
    )


def nat(facts: Facts) -> Finding:
    """Judge what our NAT does with a port."""
    name, reach = "nat", facts.reachability
    if reach is None or reach.mapping == "unknown":
        return not_measured(name, "connect with two public members: they tell the port")
    at = f" at {reach.external}" if reach.external else ""
    if reach.mapping == "none":
        return ok(name, f"none in between{at}")
    if reach.mapping == "endpoint_independent":
        return ok(name, f"one mapping for all destinations{at}: punching works")
    counted = ", ports count up and are guessed" if reach.sequential else ""
    if reach.open_to_the_internet:
        return ok(name, f"maps per destination{counted}, but a port leads to us")
    return warn(
        name,
        "E_NAT_SYMMETRIC",
        f"maps per destination (symmetric NAT){at}{counted}",
        "enable UPnP or forward a TCP port on the router, or use IPv6; until then "
        "peers behind such a NAT are reached through a relay",
    )


def port_mapping(facts: Facts) -> Finding:
    """Judge whether the router grants a port."""
    name, mapping = "port-mapping", facts.port_mapping
    if facts.reachability is not None and facts.reachability.open_to_the_internet:
        return ok(name, "not needed: public")
    if mapping is not None and mapping.needless:
        return ok(name, mapping.refusal.reason if mapping.refusal else "not needed")
    if facts.listening is not None and facts.listening.only_loopback:
        return ok(name, "not needed: this peer listens on loopback only")
    if mapping is None:
        return not_measured(
            name, "enable UPnP on the router, or forward a TCP port to this machine"
        )
    if mapping.mapped and mapping.public:
        return ok(name, f"{listed(mapping.mapped)} by {mapping.method or 'the router'}")
    if mapping.mapped:
        return warn(
            name,
            "E_MAPPING_PRIVATE",
            f"the router maps {listed(mapping.mapped)}, which is not public either",
            "a second router is in between (carrier-grade NAT): ask the provider for "
            "a public address, or use IPv6",
        )
    no = mapping.refusal
    return warn(
        name,
        no.code if no else "E_NO_MAPPING",
        no.reason if no else "no router grants a port",
        (no.next_step if no else "") or "enable UPnP or NAT-PMP on the router",
    )


def relay(facts: Facts) -> Finding:
    """Judge whether others reach us through a relay.

    A lack of relays keeps this peer from working only where it is known to be private
    and a member is missing now; else it is slower to recover, or not known to matter.
    """
    name, relays, reach = "relay", facts.relays, facts.reachability
    if reach is not None and reach.verdict == "public":
        if reach.open_to_the_internet:
            return ok(name, "not needed: public")
        return ok(name, f"not needed: open to all of this {_SCOPES[reach.scope]}")
    if relays is None:
        return not_measured(name, "connect with a public member that relays")
    held = [
        each.relay
        + (f" {milliseconds(each.rtt_seconds)}" if each.rtt_seconds is not None else "")
        for each in relays.held
    ]
    if held and len(held) >= relays.wanted:
        return ok(name, f"slots at {listed(held)}")
    said = _refusals(relays)
    if held:
        text = f"slot at {listed(held)} only{said}"
        return warn(name, "E_RELAY_FEW", text, f"a second relay: {RELAY_STEP}")
    text = f"no slot at any relay{said}"
    away = facts.members.away if facts.members is not None else ()
    if reach is not None and reach.verdict == "private" and away:
        text = f"{text}; private, and not connected with {listed(away)}"
        return fail(name, "E_NO_RELAY", text, RELAY_STEP)
    return warn(name, "E_NO_RELAY", text + _spared(facts.members), RELAY_STEP)


def _refusals(relays: Relays) -> str:
    said = "; ".join(f"{relay}: {no.code} {no.reason}" for relay, no in relays.refused)
    return f"; {said}" if said else ""


def _spared(members: Members | None) -> str:
    """Return that nobody misses a relay now, if so."""
    if members is None or members.away or not members.connected:
        return ""
    return f"; {len(members.connected)} of {len(members.connected)} connected without"


def relaying(facts: Facts) -> Finding:
    """Say what we do for others; it is nobody's fault whatever it is."""
    name, mine = "relaying", facts.relaying
    if mine is None:
        return not_measured(name, "join a mesh: then this peer may relay")
    if not mine.active:
        why = {
            "never": "nat.relay.volunteer=never",
            "auto": "the internet does not reach this peer, as far as is known",
        }.get(mine.volunteer, mine.volunteer)
        return ok(name, f"not for others: {why}")
    limit = (
        f" of {rate(mine.max_bytes_per_second)}" if mine.max_bytes_per_second else ""
    )
    return ok(
        name,
        f"for others: {counted(mine.reservations, 'reservation')}, "
        f"{counted(mine.circuits, 'circuit')}, within a budget{limit}",
    )


def mtu(facts: Facts) -> Finding:
    """Judge the size of packets that pass."""
    name = "mtu"
    if not facts.mtus:
        return not_measured(name, "connect with a member directly")
    least = min(facts.mtus, key=lambda path: path.mtu_bytes)
    segments = f" (segments of {least.mss_bytes} B)" if least.mss_bytes else ""
    text = f"{least.mtu_bytes} B{segments} to {least.peer}"
    if least.mtu_bytes < MIN_MTU_BYTES:
        return warn(
            name,
            "E_MTU_SMALL",
            text,
            "raise the MTU of the tunnel or VPN in between to 1280 B or more",
        )
    return ok(name, text)
