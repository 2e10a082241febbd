"""What the doctor says of the mesh: bootstraps, islands, bandwidth, versions."""

from __future__ import annotations

from nat.doctor.facts import Facts
from nat.doctor.findings import (
    Finding,
    counted,
    fail,
    listed,
    not_measured,
    ok,
    rate,
    warn,
)

SLOW_LINK_BYTES_PER_SECOND = 1e6 / 8
"""1 Mbit/s: below it even a low-communication outer loop waits for the link."""


def bootstraps(facts: Facts) -> Finding:
    """Judge whether we would find the mesh again."""
    name = "bootstraps"
    if facts.bootstraps is None:
        return not_measured(name, "join through an invite: it names them")
    if not facts.bootstraps:
        return ok(name, "none named: this peer made the mesh")
    dead = [f"{at.addr}: {at.error}" for at in facts.bootstraps if at.error]
    if not dead:
        return ok(name, f"{len(facts.bootstraps)} of {len(facts.bootstraps)} answer")
    alive = len(facts.bootstraps) - len(dead)
    text = f"{alive} of {len(facts.bootstraps)} answer; {listed(dead)}"
    if alive or (facts.members is not None and facts.members.connected):
        return warn(
            name,
            "E_BOOTSTRAP",
            text,
            "nothing now: members that are connected do instead; make new invites",
        )
    return fail(
        name,
        "E_BOOTSTRAP",
        text,
        "start one of them, or join again with a fresh invite",
    )


def members(facts: Facts) -> Finding:
    """Judge whether we see all of the mesh, or an island of it."""
    name, members = "members", facts.members
    if members is None:
        return not_measured(name, "`fabric mesh init NAME`, or `fabric join TOKEN`")
    if not members.known:
        return ok(name, "no other member yet: `fabric invite` makes a token")
    away = sorted(set(members.known) - set(members.connected) - set(members.stale))
    text = f"{len(members.connected)} of {len(members.known)} connected"
    if not away:
        gone = f", {len(members.stale)} long gone" if members.stale else ""
        return ok(name, text + gone)
    step = f"`fabric doctor --peer {away[0]}` says why"
    if not members.connected:
        return fail(name, "E_ISLAND", f"{text}: alone; missing {listed(away)}", step)
    if len(away) > len(members.connected):
        return warn(
            name, "E_ISLAND", f"{text}: an island; missing {listed(away)}", step
        )
    return warn(name, "E_MEMBERS_AWAY", f"{text}; missing {listed(away)}", step)


def links(facts: Facts) -> Finding:
    """Judge the bandwidth of measured links."""
    name = "bandwidth"
    measured = [link for link in facts.links or () if link.up or link.down]
    if not measured:
        return not_measured(name, "start a job: its links are probed")
    slowest = min(measured, key=lambda link: min(link.up or 1e18, link.down or 1e18))
    text = (
        f"slowest of {counted(len(measured), 'link')}: {slowest.peer}, "
        f"up {rate(slowest.up)}, down {rate(slowest.down)}, {slowest.path}"
    )
    if min(slowest.up or 1e18, slowest.down or 1e18) < SLOW_LINK_BYTES_PER_SECOND:
        return warn(
            name,
            "E_LINK_SLOW",
            text,
            f"`fabric doctor --peer {slowest.peer}` says whether a better path exists",
        )
    return ok(name, text)


def versions(facts: Facts) -> Finding:
    """Judge whether all members speak the same protocols."""
    name = "versions"
    if not facts.versions:
        return not_measured(name, "connect with a member")
    own = _series(facts.own_version)
    other = sorted(p for p, v in facts.versions.items() if v and _series(v) != own)
    if not other:
        return ok(name, f"{counted(len(facts.versions), 'member')} on {own}")
    text = listed(f"{peer} {facts.versions[peer]}" for peer in other)
    return warn(
        name,
        "E_VERSION_DIFFERS",
        f"this peer has {facts.own_version}, {text}",
        "install one version everywhere: `pip install -U peerfabric`",
    )


def _series(version: str) -> str:
    """Return "0.1" of "0.1.3": what speaks the same protocols."""
    return ".".join(version.split(".")[:2])
