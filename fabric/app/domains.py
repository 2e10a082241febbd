"""What fails together, as far as addresses show it: one machine, one site."""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints.mesh.placement import Domain
from crdt_store.service import Store
from crdt_store.views import MemberRecord
from fabric.core.ids import PeerId
from nat.addresses import AddressClass, Ip, classify, endpoint_of, parse_ip

_SITE_BITS = {4: 24, 6: 48}
"""Prefix that one site's addresses share; a provider gives a site at least a /48."""
NOWHERE = "loopback"


def member_domains(store: Store, own: PeerId) -> dict[PeerId, Domain]:
    """Return where each member that is there is, ourselves included."""
    records = store.members.live()
    mine = store.members.get(own)
    if mine is not None:
        records = {**records, own: mine}
    return {peer: domain_of_record(record) for peer, record in records.items()}


def site_members(store: Store, own: PeerId) -> frozenset[PeerId]:
    """Return the members that announce addresses of our site, without ourselves."""
    domains = member_domains(store, own)
    mine = domains.pop(own, None)
    if mine is None:
        return frozenset()
    return frozenset(
        peer for peer, domain in domains.items() if domain.site == mine.site
    )


def domain_of_record(record: MemberRecord) -> Domain:
    """Return where a member is, by the addresses it announces.

    Peers behind one router show one public address: they share a site. Peers with the
    same addresses are on one machine. An address can be a lie; it then spoils the
    spread of copies, nothing else.
    """
    seen = sorted(_ips(record), key=str)
    public = [ip for ip in seen if classify(ip) is AddressClass.PUBLIC]
    site = _network((public or seen)[0]) if seen else NOWHERE
    host = ",".join(str(ip) for ip in seen) or NOWHERE
    return Domain(site, host)


def _network(ip: Ip) -> str:
    bits = _SITE_BITS[ip.version]
    shift = ip.max_prefixlen - bits
    return f"{int(ip) >> shift:x}/{bits}"


def _ips(record: MemberRecord) -> set[Ip]:
    ends = (endpoint_of(addr) for addr in _direct(record.addrs))
    found = {end[0] for end in ends if end is not None}
    data = (parse_ip(addr.rpartition(":")[0].strip("[]")) for addr in record.data_addrs)
    found |= {ip for ip in data if ip is not None}
    return {ip for ip in found if classify(ip) is not AddressClass.LOOPBACK}


def _direct(addrs: Iterable[str]) -> list[str]:
    """Return the addresses that are the member's own, not its relays'."""
    return [addr for addr in addrs if "/p2p-circuit" not in addr]
