"""Facts about the way to one peer, for ``fabric doctor --peer`` and ``fabric why``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fabric.app.net_checks import dial_multiaddrs
from fabric.app.peer_names import name_of
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from fabric.net.ports import PROTOCOL_RPC, Decision
from nat.doctor.facts import Dialled, PeerFacts, Reachability, Refusal

if TYPE_CHECKING:
    from fabric.app.diagnose import Traversal
    from fabric.app.session import Session


async def collect_peer(
    session: Session, nat: Traversal | None, peer: PeerId
) -> PeerFacts:
    """Return what stands between us and ``peer``; dials each of its addresses."""
    now = trio.current_time()
    contact = session.book.contacts.get(peer)
    standing = session.standings.of(peer, now)
    connected = peer in session.rpc.connected()
    last = contact.last_error if contact is not None else None
    retry_at = contact.retry_at if contact is not None else 0.0
    return PeerFacts(
        peer=name_of(session, peer),
        not_member=_no(session.store.authority.membership(peer)),
        addresses=await _addresses(session, peer),
        gate=_no(session.gate.allows(peer, PROTOCOL_RPC)),
        admission=str(standing.state.value),
        admission_reason=standing.reason,
        connected=connected,
        path=str(session.rpc.kind(peer) or "direct") if connected else "",
        rtt_seconds=session.rpc.rtt_seconds(peer) if connected else None,
        last_error=None if last is None else _refusal(last),
        retry_in_seconds=max(0.0, retry_at - now),
        circuits=None if nat is None else nat.circuits(peer),
        punched=None if nat is None else nat.punched(peer),
        nat=_nat_of(session, nat, peer),
        on_demand=session.hood.reach_of(peer) == "on demand",
    )


async def _addresses(session: Session, peer: PeerId) -> tuple[Dialled, ...]:
    contact = session.book.contacts.get(peer)
    known = () if contact is None else contact.known.all()
    sources: dict[str, str] = {each.addr: each.source for each in known}
    # the book takes records in now and then: the latest may not be in it yet
    record = session.store.members.get(peer)
    for addr in record.addrs if record is not None else ():
        sources.setdefault(addr, "record")
    return await dial_multiaddrs(list(sources.items()))


def _nat_of(
    session: Session, nat: Traversal | None, peer: PeerId
) -> Reachability | None:
    """Return what the peer said of its NAT: in a punch, else in its record."""
    said = None if nat is None else nat.peer_nat(peer)
    record = session.store.members.get(peer)
    if said is None and record is not None and record.data_addrs:
        return Reachability(verdict="public", external=record.data_addrs[0])
    return said


def _no(decision: Decision) -> Refusal | None:
    if decision.allowed:
        return None
    return Refusal(decision.code, decision.reason, decision.next_step)


def _refusal(error: FabricError) -> Refusal:
    return Refusal(error.code, error.reason, error.next_step)
