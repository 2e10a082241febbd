"""Who is in the mesh, whom we reach, and at which addresses."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from crdt_store.service import Store
from fabric.core.ids import PeerId
from fabric.jobs.ports import MemberFacts
from fabric.net.rpc import RpcService

OWN_ADDRS = 4
MAX_BOOTSTRAP = 8
"""Addresses in an invite; its token is pasted by hand."""
MAX_ADDR_CHARS = 300


def bootstrap_addrs(
    store: Store, reached: Collection[PeerId], own: Sequence[str]
) -> tuple[str, ...]:
    """Return addresses for an invite: ours, then one of each member in ``reached``."""
    members = store.members.all()
    others = []
    for peer in sorted(set(reached) & set(members)):
        # what a member announces is its own claim: take what fits a token
        fit = (a for a in members[peer].addrs if a.endswith(f"/p2p/{peer}"))
        others += [addr for addr in fit if len(addr) <= MAX_ADDR_CHARS][:1]
    return (*own[:OWN_ADDRS], *others)[:MAX_BOOTSTRAP]


def live_members(
    store: Store, rpc: RpcService, own: PeerId
) -> dict[PeerId, MemberFacts]:
    """Return the members that can take work now: ourselves and whom RPC reaches.

    Members show software evidence before RPC opens to them, so all are of that tier.
    """
    live = rpc.connected() | {own}
    return {
        peer: MemberFacts(memory_bytes=r.hardware.memory_bytes, trust="software")
        for peer, r in store.members.all().items()
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
