"""What the doctor says of this machine: clock, listening, firewall, UDP, IPv6."""

from __future__ import annotations

from statistics import median

from nat.doctor.facts import Facts
from nat.doctor.findings import (
    Finding,
    counted,
    fail,
    listed,
    not_measured,
    ok,
    warn,
)

CLOCK_WARN_SECONDS = 5.0
CLOCK_FAIL_SECONDS = 60.0
"""Replicated entries further in the future than this are refused by others."""
NO_NEED = "nothing is needed"


def clock(facts: Facts) -> Finding:
    """Judge our clock by those of the members."""
    name = "clock"
    if not facts.clocks:
        return not_measured(name, "connect with a member: its clock is compared")
    # the median is ours to mend, a single peer's skew is that peer's
    ours = median(sample.skew_seconds for sample in facts.clocks)
    if abs(ours) > CLOCK_WARN_SECONDS:
        text = f"{abs(ours):.1f} s {'behind' if ours > 0 else 'ahead of'} the mesh"
        step = "set this machine's clock: `timedatectl set-ntp true`"
        if abs(ours) > CLOCK_FAIL_SECONDS:
            return fail(name, "E_CLOCK_SKEW", text, step)
        return warn(name, "E_CLOCK_SKEW", text, step)
    worst = max(facts.clocks, key=lambda sample: abs(sample.skew_seconds))
    if abs(worst.skew_seconds) > CLOCK_WARN_SECONDS:
        return warn(
            name,
            "E_CLOCK_PEER",
            f"{worst.peer} is {abs(worst.skew_seconds):.1f} s off, others agree",
            f"set the clock of {worst.peer}",
        )
    return ok(
        name,
        f"within {max(abs(ours), 0.1):.1f} s of {counted(len(facts.clocks), 'peer')}",
    )


def listen(facts: Facts) -> Finding:
    """Judge where we listen."""
    name, listening = "listen", facts.listening
    if listening is None:
        return not_measured(name, "join a mesh: then this peer listens")
    both = f"control {listed(listening.control)}; data {listed(listening.data)}"
    if not listening.control or not listening.data:
        return fail(
            name, "E_NOT_LISTENING", both, "set host.listen to /ip4/0.0.0.0/tcp/0"
        )
    if listening.only_loopback:
        return warn(
            name,
            "E_LOOPBACK_ONLY",
            f"{both}: nobody outside this machine can dial that",
            "set host.listen to /ip4/0.0.0.0/tcp/0, unless this is a test",
        )
    return ok(name, both)


def firewall(facts: Facts) -> Finding:
    """Judge whether our own machine lets us in."""
    name, listening = "firewall", facts.listening
    if listening is not None and listening.only_loopback:
        return ok(name, "not asked: this peer listens on loopback only")
    if listening is None or not listening.dialled:
        return not_measured(name, "listen on an address that is not loopback")
    refused = [f"{at.addr}: {at.error}" for at in listening.dialled if at.error]
    hint = "; packet filter rules exist" if listening.has_rules else ""
    if not refused:
        return ok(
            name,
            f"{counted(len(listening.dialled), 'own port')} dialled: all answer{hint}",
        )
    text = f"{listed(refused)}{hint}"
    step = "allow these TCP ports in this machine's firewall (nft, iptables, ufw)"
    if len(refused) == len(listening.dialled):
        return fail(name, "E_FIREWALL", text, step)
    return warn(name, "E_FIREWALL", text, step)


def udp(facts: Facts) -> Finding:
    """Judge whether UDP gets out; only port mapping and mDNS use it."""
    name = "udp"
    if facts.udp is None:
        return not_measured(name, f"{NO_NEED}: traffic between peers is TCP")
    if facts.udp == "answered":
        return ok(name, "a peer's machine answers UDP")
    if facts.udp == "blocked":
        return warn(
            name,
            "E_UDP_BLOCKED",
            "this machine's firewall lets no UDP out",
            "allow outgoing UDP for port mapping and mDNS; traffic between peers is "
            "TCP and goes on without",
        )
    return warn(
        name,
        "E_UDP_SILENT",
        "no peer's machine answered UDP, which many firewalls cause",
        f"{NO_NEED}: traffic between peers is TCP",
    )


def ipv6(facts: Facts) -> Finding:
    """Judge whether we have a global IPv6 address."""
    name = "ipv6"
    if facts.ipv6 is None:
        return not_measured(name, "connect this machine to a network")
    if facts.ipv6:
        return ok(name, listed(facts.ipv6))
    if facts.reachability is not None and facts.reachability.open_to_the_internet:
        return ok(name, "no global address; the IPv4 address is public")
    return warn(
        name,
        "E_NO_IPV6",
        "no global address",
        "enable IPv6 on the router if the provider has it: two IPv6 peers need no "
        "hole punching",
    )
