"""Say how things stand between this peer and another, in rows and in sentences."""

from __future__ import annotations

import trio

from attestation.states import State
from fabric.app.control_messages import PeerView
from fabric.app.session import Session
from fabric.core.ids import PeerId
from fabric.net.ports import PROTOCOL_RPC


def path_of(session: Session, peer: PeerId) -> str:
    """Return the kind of path in use with ``peer``, or "-"."""
    if peer not in session.rpc.connected():
        return "-"
    return session.paths.kind(peer) or "direct"


def peer_rows(session: Session) -> tuple[PeerView, ...]:
    """Return a row for each other member, by name."""
    members = session.store.members.all()
    known = session.store.authority.members() | set(members)
    live = session.rpc.connected()
    rows = []
    for peer in known - {session.own}:
        rtt = session.rpc.rtt_seconds(peer)
        record = members.get(peer)
        contact = session.book.contacts.get(peer)
        error = contact.last_error if contact is not None else None
        rows.append(
            PeerView(
                peer=peer,
                name=record.name if record else "",
                role=str(session.store.authority.role_of(peer) or "no member"),
                connected=peer in live,
                path=path_of(session, peer),
                rtt_ms=None if rtt is None or peer not in live else rtt * 1000,
                trust=_trust(session, peer),
                note="" if peer in live or error is None else error.code,
            )
        )
    return tuple(sorted(rows, key=lambda row: (row.name, row.peer)))


def _trust(session: Session, peer: PeerId) -> str:
    standing = session.standings.of(peer, trio.current_time())
    if standing.state is State.TRUSTED:
        return f"trusted ({standing.tier.label})"
    return str(standing.state.value)


def explain_peer(session: Session, peer: PeerId) -> tuple[str, ...]:
    """Return sentences: is it a member, may it connect, is it connected, why not."""
    lines = [f"peer {peer}"]
    members = session.store.members.all()
    record = members.get(peer)
    membership = session.store.authority.membership(peer)
    role = session.store.authority.role_of(peer)
    if membership.allowed:
        lines.append(f"it is a member of {session.mesh.name} with role {role}")
    else:
        lines.append(f"it is no member: {membership.code}: {membership.reason}")
    if record is not None:
        lines.append(f"it calls itself {record.name}, version {record.version}")
        lines.extend(f"it announces {addr}" for addr in record.addrs)
    standing = session.standings.of(peer, trio.current_time())
    lines.append(f"admission: {standing.state.value}: {standing.reason}")
    decision = session.gate.allows(peer, PROTOCOL_RPC)
    if not decision.allowed:
        lines.append(f"refused: {decision.code}: {decision.reason}")
        lines.append(f"next: {decision.next_step}")
    rtt = session.rpc.rtt_seconds(peer)
    if peer in session.rpc.connected():
        took = "" if rtt is None else f", round trip {rtt * 1000:.1f} ms"
        lines.append(f"connected: {path_of(session, peer)}{took}")
    else:
        lines.extend(_why_not_connected(session, peer))
    return tuple(lines)


def _why_not_connected(session: Session, peer: PeerId) -> list[str]:
    contact = session.book.contacts.get(peer)
    if contact is None or not contact.addrs:
        return ["not connected: no address of it is known"]
    lines = [f"not connected after {contact.failures} failed attempts in a row"]
    if contact.last_error is not None:
        error = contact.last_error
        lines.append(f"last error {error.code}: {error.reason}")
        if error.next_step:
            lines.append(f"next: {error.next_step}")
    wait = contact.retry_at - trio.current_time()
    lines.append("dialling now" if contact.dialling else f"next dial in {wait:.1f} s")
    return lines
