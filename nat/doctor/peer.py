"""The chain towards one peer: from "is it a member" to "why is the path not better".

    member -> addresses -> gate -> admission -> nat -> relay -> punch -> path

The first link that fails explains those after it, so the order is the order of cause.
"""

from __future__ import annotations

from nat.doctor.facts import (
    CircuitTried,
    Facts,
    PeerFacts,
    Punched,
    Reachability,
    Refusal,
)
from nat.doctor.findings import (
    RELAY_STEP,
    Finding,
    counted,
    duration,
    fail,
    listed,
    milliseconds,
    not_measured,
    ok,
    warn,
)

WAITING = frozenset({"unknown", "challenged"})
"""States of admission that pass by themselves."""


def diagnose_peer(peer: PeerFacts, facts: Facts) -> tuple[Finding, ...]:
    """Return a finding for each link of the chain towards ``peer``."""
    return (
        _member(peer),
        _addresses(peer),
        _gate(peer),
        _admission(peer),
        _nat(peer),
        _circuits(peer),
        _punch(peer),
        _path(peer, facts.reachability),
    )


def why_not_better(peer: PeerFacts, own: Reachability | None) -> str:
    """Return why the path with a connected ``peer`` is not a direct one.

    Empty when it is direct already. What was measured comes before what is inferred.
    """
    if peer.path in ("direct", "local", ""):
        return ""
    if peer.path == "punched":
        return "a punched path is as good as a direct one"
    if peer.punched is not None and peer.punched.refusal is not None:
        return peer.punched.refusal.reason
    mine = own is not None and own.mapping == "per_destination"
    theirs = peer.nat is not None and peer.nat.mapping == "per_destination"
    if mine and theirs:
        return "both sides map per destination (symmetric NAT)"
    if mine or theirs:
        side = "our" if mine else "the peer's"
        return f"{side} NAT maps per destination (symmetric NAT)"
    if peer.punched is None:
        return "no hole punch was tried yet"
    return "the punched connection ended; the next try follows"


def _member(peer: PeerFacts) -> Finding:
    if peer.not_member is None:
        return ok("peer.member", f"{peer.peer} is a member")
    return _refused("peer.member", peer.not_member, "`fabric status` lists the members")


def _addresses(peer: PeerFacts) -> Finding:
    name = "peer.addresses"
    if peer.addresses is None:
        return not_measured(name, "`fabric doctor --peer` dials each address")
    if not peer.addresses and peer.connected and peer.path != "relay":
        return ok(name, "none announced; it dialled us")
    if not peer.addresses:
        return _unless_connected(
            peer,
            name,
            "E_NO_ADDRESS",
            "none known",
            f"start {peer.peer}, or join it again with a fresh invite",
        )
    lines = [
        f"{at.addr}{f' [{at.source}]' if at.source else ''}: "
        + (at.error or ("answers" if at.dialled else "through a relay"))
        for at in peer.addresses
    ]
    text = "; ".join(lines)
    if any(at.dialled and not at.error for at in peer.addresses):
        return ok(name, text)
    if any(not at.dialled for at in peer.addresses) and peer.connected:
        return ok(name, text)
    return _unless_connected(
        peer,
        name,
        "E_NO_ROUTE",
        text,
        f"check that {peer.peer} runs (`fabric status` there) and its firewall",
    )


def _gate(peer: PeerFacts) -> Finding:
    if peer.gate is None:
        return ok("peer.gate", "open")
    return _refused("peer.gate", peer.gate, "`fabric why` on the peer's side")


def _admission(peer: PeerFacts) -> Finding:
    name = "peer.admission"
    said = f": {peer.admission_reason}" if peer.admission_reason else ""
    text = f"{peer.admission}{said}"
    if peer.admission == "trusted":
        return ok(name, text)
    if peer.admission in WAITING:
        return warn(
            name,
            "E_NOT_ADMITTED",
            text,
            "wait: it shows evidence as soon as it is connected",
        )
    code = f"E_{peer.admission.upper()}"
    step = f"`fabric doctor` on {peer.peer}: its evidence must be accepted again"
    if peer.admission == "suspect":
        return warn(name, code, text, step)
    return fail(name, code, text, step)


def _nat(peer: PeerFacts) -> Finding:
    name, nat = "peer.nat", peer.nat
    if nat is None or (nat.verdict == "unknown" and nat.mapping == "unknown"):
        if peer.connected and peer.path in ("direct", "local"):
            return ok(name, "not asked: the path is direct")
        return not_measured(name, "it says so when a hole is punched")
    if nat.verdict == "public":
        return ok(name, f"{peer.peer} says that the world reaches it")
    if nat.mapping != "per_destination":
        return ok(name, "one mapping for all destinations: punching works")
    counted = ", ports count up and are guessed" if nat.sequential else ""
    return warn(
        name,
        "E_NAT_SYMMETRIC",
        f"{peer.peer} says that its NAT maps per destination (symmetric NAT){counted}",
        f"map a port on the router of {peer.peer}, or use IPv6",
    )


def _circuits(peer: PeerFacts) -> Finding:
    name = "peer.relay"
    if peer.circuits is None:
        return not_measured(name, "join a mesh with a public member: it relays")
    tried = [_tried(each) for each in peer.circuits]
    if any(each.refusal is None for each in peer.circuits) or peer.path == "relay":
        return ok(name, listed(tried) or "carries the connection")
    if peer.connected:
        return ok(name, listed(["not needed", *tried]))
    if not tried:
        return warn(
            name,
            "E_NO_CIRCUIT",
            "none was tried: the peer announces no relay, or was not dialled yet",
            f"{RELAY_STEP}, then wait for {peer.peer} to find it",
        )
    first = next(no for each in peer.circuits if (no := each.refusal))
    return fail(name, "E_CIRCUIT", listed(tried), first.next_step or RELAY_STEP)


def _tried(each: CircuitTried) -> str:
    no = each.refusal
    took = f" in {milliseconds(each.seconds)}" if each.seconds else ""
    return f"{each.relay}: {f'{no.code} {no.reason}' if no else f'ok{took}'}" + _ago(
        each.age_seconds
    )


def _punch(peer: PeerFacts) -> Finding:
    name, punched = "peer.punch", peer.punched
    if peer.path in ("direct", "local"):
        return ok(name, "not needed: direct")
    if punched is None:
        return not_measured(name, "it follows once a relay connects the two")
    text = _punch_text(punched)
    if punched.refusal is None or peer.path == "punched":
        return ok(name, text)
    step = punched.refusal.next_step or "map a port on one of the routers, or use IPv6"
    return warn(name, punched.refusal.code, text, step)


def _punch_text(punched: Punched) -> str:
    """Return what came of it, how long it took, and what was dialled."""
    facts = [f"it took {milliseconds(punched.seconds)}"] if punched.seconds else []
    if punched.attempts:
        facts.append(counted(punched.attempts, "dial"))
    if punched.endpoints:
        facts.append(f"to {listed(punched.endpoints)}")
    what = "worked" if punched.refusal is None else punched.refusal.reason
    return what + "".join(f", {fact}" for fact in facts) + _ago(punched.age_seconds)


def _ago(seconds: float) -> str:
    return f" ({duration(seconds)} ago)" if seconds else ""


def _path(peer: PeerFacts, own: Reachability | None) -> Finding:
    name = "peer.path"
    if peer.on_demand:
        return ok(name, "not a neighbour: connected when needed")
    if not peer.connected:
        last = peer.last_error or Refusal("E_NOT_CONNECTED", "no dial was made yet")
        wait = (
            f"; next dial in {peer.retry_in_seconds:.0f} s"
            if peer.retry_in_seconds > 0
            else ""
        )
        return fail(
            name,
            last.code,
            f"not connected: {last.reason}{wait}",
            last.next_step or "mend the first line above that is not ok",
        )
    took = f" {milliseconds(peer.rtt_seconds)}" if peer.rtt_seconds is not None else ""
    if peer.path != "relay":
        return ok(name, f"{peer.path}{took}")
    return warn(
        name,
        "E_RELAYED",
        f"relay{took}: {why_not_better(peer, own)}",
        "jobs run meanwhile, slower; map a port on one router, or use IPv6",
    )


def _refused(name: str, refusal: Refusal, otherwise: str) -> Finding:
    step = refusal.next_step or otherwise
    return fail(name, refusal.code, refusal.reason, step)


def _unless_connected(
    peer: PeerFacts, name: str, code: str, detail: str, next_step: str
) -> Finding:
    """Return a warning when connected all the same, else a failure."""
    if peer.connected:
        return warn(name, code, detail, "nothing now: it is connected another way")
    return fail(name, code, detail, next_step)
