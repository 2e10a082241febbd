"""What the doctor says of the mesh: who finds whom, bandwidth, versions."""

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
    away = members.away
    text = f"{len(members.connected)} of {len(members.known)} connected"
    if members.on_demand:
        text += f", {len(members.on_demand)} when needed"
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


def rendezvous(facts: Facts) -> Finding:
    """Judge whether the mesh fell into islands that could find each other."""
    name, seen = "rendezvous", facts.rendezvous
    if seen is None:
        return not_measured(name, "join a mesh: then its meeting points are asked")
    failed = "; ".join(f"{point}: {why}" for point, why in seen.failed if why)
    text = seen.sentence + (f"; {failed}" if failed else "")
    if seen.unconnected:
        return warn(
            name,
            "E_ISLAND",
            f"{text}: {listed(seen.unconnected)}",
            f"they are dialled now; `fabric why {seen.unconnected[0]}` says how it "
            "goes",
        )
    missing = facts.members is not None and facts.members.away
    if seen.registered or not (seen.failed or missing):
        return ok(name, text)
    return warn(
        name,
        "E_NO_RENDEZVOUS",
        f"{text}: islands of this mesh would not find each other",
        "start a member with a public address, or name one in nat.discovery.bootstrap",
    )


def mdns(facts: Facts) -> Finding:
    """Judge whether members on this network hear each other."""
    name, local = "mdns", facts.mdns
    if local is None or local.state == "starting":
        return not_measured(name, "ask again in a few seconds")
    if local.state == "announcing":
        return ok(name, f"announcing; heard {counted(local.heard, 'member')}")
    if local.state == "failed":
        return warn(
            name,
            "E_MDNS",
            local.reason,
            local.next_step or "nothing: peers are found by invite and rendezvous",
        )
    return ok(name, f"{local.state}{f': {local.reason}' if local.reason else ''}")


def remembered(facts: Facts) -> Finding:
    """Judge whether a restart finds the mesh without anybody's help."""
    name, file = "peers-file", facts.remembered
    if file is None:
        return not_measured(name, "join a mesh: then peers are remembered")
    if file.problem is None:
        return ok(name, f"{counted(file.peers, 'peer')} remembered for a restart")
    no = file.problem
    return warn(name, no.code, no.reason, no.next_step or "nothing: it is made anew")


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
