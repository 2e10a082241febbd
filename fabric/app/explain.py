"""Say how things stand between this peer and another, in rows and in sentences."""

from __future__ import annotations

import trio

from attestation.states import State
from fabric.app.addr_text import short_addr
from fabric.app.control_messages import PeerView
from fabric.app.diagnose import traversal_of
from fabric.app.peer_facts import collect_peer
from fabric.app.session import Session
from fabric.core.ids import PeerId
from fabric.net.ports import LinkMeasurement
from nat.doctor.facts import Facts, PeerFacts
from nat.doctor.peer import diagnose_peer, why_not_better

WHY_SECONDS = 5.0
"""Bound of dialling a peer's addresses for an explanation."""
TRIED = ("peer.nat", "peer.relay", "peer.punch")
"""Lines of the doctor's chain that tell what was tried, also when all is well."""


def path_of(session: Session, peer: PeerId) -> str:
    """Return the kind of path in use with ``peer``, or "-"."""
    if peer not in session.rpc.connected():
        return "-"
    return session.rpc.kind(peer) or "direct"


def connection_kinds(session: Session, peer: PeerId) -> tuple[str, ...]:
    """Return the kinds of all live connections with ``peer``, best first."""
    kinds = [info.kind for info in session.host.connections(peer)]
    if (rpc := session.rpc.kind(peer)) is not None:
        kinds.insert(0, rpc)
    order = ("local", "direct", "punched", "relay")
    return tuple(kind for kind in order if kind in kinds)


def peer_rows(session: Session) -> tuple[PeerView, ...]:
    """Return a row for each other member with a record or a connection, by name.

    Records last a day: who is longer away is among those that ``fabric trust list``
    shows, and here no more.
    """
    store = session.store
    connected = session.rpc.connected() & store.authority.members()
    known = store.members.all().keys() | (connected - store.members.left())
    rows = [_row(session, peer) for peer in known - {session.own}]
    return tuple(sorted(rows, key=lambda row: (row.name, row.peer)))


def _row(session: Session, peer: PeerId) -> PeerView:
    record = session.store.members.get(peer)
    contact = session.book.contacts.get(peer)
    error = contact.last_error if contact is not None else None
    live = peer in session.rpc.connected()
    rtt = session.rpc.rtt_seconds(peer) if live else None
    nat = traversal_of(session)
    link = nat.link(peer) if nat is not None else None
    load = session.store.liveness.load(peer)
    return PeerView(
        peer=peer,
        name=record.name if record else "",
        role=str(session.store.authority.role_of(peer) or "no member"),
        connected=live,
        path=path_of(session, peer),
        rtt_ms=None if rtt is None else rtt * 1000,
        trust=_trust(session, peer),
        note="" if live or error is None else error.code,
        up_mbit=_mbit(link, up=True),
        down_mbit=_mbit(link, up=False),
        version=record.version if record else "",
        addrs=_addrs(session, peer),
        control=connection_kinds(session, peer),
        liveness=session.store.liveness.state(peer),
        running=load.running if load is not None else None,
        reach=session.hood.reach_of(peer),
    )


def _addrs(session: Session, peer: PeerId) -> tuple[str, ...]:
    """Return where ``peer`` was last known to be; the book knows neighbours best."""
    record = session.store.members.get(peer)
    announced = record.addrs if record is not None else ()
    return session.book.addrs_of(peer) or announced


def _mbit(link: LinkMeasurement | None, *, up: bool) -> float | None:
    """Return Mbit/s one way; None when it was not measured."""
    if link is None:
        return None
    rate = link.up_bytes_per_second if up else link.down_bytes_per_second
    return round(rate * 8 / 1e6, 3) if rate else None


def _trust(session: Session, peer: PeerId) -> str:
    standing = session.standings.of(peer, trio.current_time())
    if standing.state is State.TRUSTED:
        return f"trusted ({standing.tier.label})"
    return str(standing.state.value)


async def explain_peer(session: Session, peer: PeerId) -> tuple[str, ...]:
    """Return sentences: is it a member, may it connect, is it connected, why not.

    The last lines are those of the doctor's chain that are not as they should be.
    """
    lines = [f"peer {peer}", *_introduce(session, peer)]
    nat = traversal_of(session)
    with trio.move_on_after(WHY_SECONDS) as scope:
        facts = await collect_peer(session, nat, peer)
        own = Facts(reachability=None if nat is None else nat.reachability())
        lines += _sentences(facts, own)
    if scope.cancelled_caught:
        lines.append(f"its addresses gave no answer within {WHY_SECONDS:.0f} s")
    return tuple(lines)


def _introduce(session: Session, peer: PeerId) -> list[str]:
    lines = []
    record = session.store.members.get(peer)
    role = session.store.authority.role_of(peer)
    if session.store.authority.membership(peer).allowed:
        lines.append(f"it is a member of {session.mesh.name} with role {role}")
    if record is not None:
        lines.append(f"it calls itself {record.name}, version {record.version}")
        addrs = ", ".join(map(short_addr, record.addrs)) or "nothing"
        lines.append(f"it announces {addrs}")
    if peer != session.own:
        lines.append(_alive(session, peer))
    return lines


_MEANING = {
    "alive": "it answers probes, ours or those of others",
    "suspect": "it did not answer a probe; it still may",
    "dead": "nobody we asked reaches it; its record stays, and it is tried again",
    "unknown": "nobody has heard of it since this daemon started",
}


def _alive(session: Session, peer: PeerId) -> str:
    liveness = session.store.liveness
    state, ago = liveness.state(peer), liveness.heard_seconds_ago(peer)
    line = f"liveness: {state}: {_MEANING[state]}"
    if ago is not None:
        line += f"; it spoke to us {ago:.0f} s ago"
    if (load := liveness.load(peer)) is not None:
        line += f"; {load.running} jobs there, {load.queued} requests wait"
    return line


def _sentences(peer: PeerFacts, own: Facts) -> list[str]:
    lines = [f"admission: {peer.admission}: {peer.admission_reason}"]
    if peer.connected:
        took = "" if peer.rtt_seconds is None else f" {peer.rtt_seconds * 1000:.1f} ms"
        lines.append(f"connected: {peer.path}{took}")
        if why := why_not_better(peer, own.reachability):
            lines.append(f"{peer.path}: {why}")
    elif peer.on_demand:
        lines.append("not a neighbour: it is connected as soon as it is needed")
    shown = ("fail",) if peer.connected or peer.on_demand else ("fail", "warn")
    for finding in diagnose_peer(peer, own):
        if finding.code == "E_NOT_MEASURED":
            continue
        if finding.status in shown:
            lines.append(f"{finding.name}: {finding.code}: {finding.detail}")
            lines.append(f"next: {finding.next_step}")
        elif finding.name in TRIED and not finding.detail.startswith("not "):
            lines.append(f"{finding.name}: {finding.detail}")
    return lines
