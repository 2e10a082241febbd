"""Who is in the mesh, whom we reach, and at which addresses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from crdt_store.service import Store
from fabric.app.peer_book import PeerBook
from fabric.core.ids import PeerId
from fabric.jobs.ports import MemberFacts
from fabric.net.rpc import RpcService
from nat.addresses import AddressClass, classify, endpoint_of

OWN_ADDRS = 4
OWN_CIRCUITS = 2
"""Of these, addresses through relays: as many as a peer has reservations."""
MAX_BOOTSTRAP = 8
"""Addresses in an invite; its token is pasted by hand."""
MAX_ADDR_CHARS = 300
_REACH = {
    AddressClass.PUBLIC: 0,
    AddressClass.PRIVATE: 2,
    AddressClass.CGNAT: 2,
    AddressClass.LINK_LOCAL: 3,
    AddressClass.LOOPBACK: 4,
}
_NOWHERE = 5
_PUBLIC = _REACH[AddressClass.PUBLIC]
_CIRCUIT = 1
_SITE = _REACH[AddressClass.PRIVATE]


def reach(addr: str) -> int:
    """Return how far ``addr`` reaches, 0 being everywhere: for a stranger's first dial.

    A circuit reaches as far as its relay, but costs the relay's goodwill; a name was
    given by an operator, who means it to be found.
    """
    start, circuit, _ = addr.partition("/p2p-circuit")
    if start.startswith("/dns"):
        return _CIRCUIT if circuit else _PUBLIC
    end = endpoint_of(start)
    if end is None:
        return _NOWHERE
    own = _REACH.get(classify(end[0]), _NOWHERE)
    return max(own, _CIRCUIT) if circuit else own


def own_bootstrap(own: Sequence[str]) -> tuple[str, ...]:
    """Return our addresses for an invite, the widest first.

    One of our site is always among them: a newcomer next door needs no relay, and our
    router may not send back what leaves for its own public address.
    """
    fit = sorted((a for a in own if len(a) <= MAX_ADDR_CHARS), key=reach)
    wide = [addr for addr in fit if reach(addr) == _PUBLIC]
    circuits = [addr for addr in fit if reach(addr) == _CIRCUIT][:OWN_CIRCUITS]
    site = [addr for addr in fit if reach(addr) >= _SITE]
    first = (wide + circuits)[: OWN_ADDRS - min(1, len(site))]
    return tuple(first + site[: OWN_ADDRS - len(first)])


def bootstrap_addrs(
    store: Store, reached: Collection[PeerId], own: Sequence[str]
) -> tuple[str, ...]:
    """Return addresses for an invite: ours, then one of each member in ``reached``.

    Members that everybody can reach come first, then those behind relays.
    """
    members = store.members.all()
    others = []
    for peer in set(reached) & set(members):
        # what a member announces is its own claim: take what fits a token
        fit = (a for a in members[peer].addrs if a.endswith(f"/p2p/{peer}"))
        best = sorted((a for a in fit if len(a) <= MAX_ADDR_CHARS), key=reach)
        others += [(reach(addr), peer, addr) for addr in best[:1]]
    ours = own_bootstrap(own)
    return (*ours, *(addr for *_, addr in sorted(others)))[:MAX_BOOTSTRAP]


def rendezvous_groups(
    configured: Sequence[str],
    invited: Sequence[str],
    relays: Iterable[PeerId],
    book: PeerBook,
) -> tuple[frozenset[PeerId], ...]:
    """Return candidates for rendezvous points in groups, the most shared ones first.

    Two islands need one point in common: they likely share what the operator configured
    and what the invite named, then relays, then whoever they remember as public.
    """
    public = frozenset(
        peer
        for peer, contact in book.contacts.items()
        if not contact.hearsay and any(reach(a) == _PUBLIC for a in contact.addrs)
    )
    named = (frozenset(by_peer(addrs)) for addrs in (configured, invited))
    return (*named, frozenset(relays), public)


class OnDemand(Protocol):
    """Knows the members that are no neighbours."""

    def on_demand(self) -> frozenset[PeerId]:
        """Return who is connected as soon as it is needed."""
        ...


def live_members(
    store: Store, rpc: RpcService, own: PeerId, others: OnDemand
) -> dict[PeerId, MemberFacts]:
    """Return the members that can take work now: ourselves and whom RPC reaches.

    A connection outlives a peer that hangs, so liveness has a say too. Of those that
    are connected on demand it is all there is to know.

    Members show software evidence before RPC opens to them, so all are of that tier.
    """
    live = rpc.connected() | {own} | others.on_demand()
    return {
        peer: MemberFacts(memory_bytes=r.hardware.memory_bytes, trust="software")
        for peer, r in store.members.live().items()
        if peer in live
    }


def known_members(store: Store) -> dict[PeerId, tuple[str, ...]]:
    """Return the addresses of the current members."""
    members = store.authority.members()
    return {p: r.addrs for p, r in store.members.all().items() if p in members}


def by_peer(addrs: Sequence[str]) -> dict[PeerId, list[str]]:
    """Return addresses by the peer id that each ends in."""
    found: dict[PeerId, list[str]] = {}
    for addr in addrs:
        found.setdefault(PeerId(addr.rpartition("/p2p/")[2]), []).append(addr)
    return found
