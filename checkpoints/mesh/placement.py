"""Who should hold a copy: one answer on all peers that know the same facts. Pure.

Copies go to different sites first, then to different hosts, then anywhere; among equals
the rendezvous order of the root decides, so that roots spread over the peers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from fabric.core.digest import rendezvous_order
from fabric.core.ids import PeerId


class Domain(NamedTuple):
    """What fails together: a machine, and the site it stands at."""

    site: str
    host: str


Domains = Mapping[PeerId, Domain]


def spread(
    root: str,
    peers: Iterable[PeerId],
    domains: Domains,
    held: Iterable[PeerId] = (),
    *,
    count: int,
) -> list[PeerId]:
    """Return the first ``count`` of ``peers`` to which copies should go, in order.

    Args:
        root: What is copied.
        peers: Who may hold it.
        domains: Where each peer is; one that is missing is a domain of its own.
        held: Who holds a copy already: other domains come first.
        count: Most peers returned.
    """
    left = [PeerId(name) for name in rendezvous_order(root.encode(), set(peers))]
    taken = [domain_of(peer, domains) for peer in held]
    sites, hosts = {d.site for d in taken}, {d.host for d in taken}
    order: list[PeerId] = []
    while left and len(order) < count:
        best = min(left, key=lambda p: _crowded(domain_of(p, domains), sites, hosts))
        left.remove(best)
        order.append(best)
        domain = domain_of(best, domains)
        sites.add(domain.site)
        hosts.add(domain.host)
    return order


def _crowded(domain: Domain, sites: set[str], hosts: set[str]) -> tuple[bool, bool]:
    return domain.site in sites, domain.host in hosts


def domain_of(peer: PeerId, domains: Domains) -> Domain:
    """Return where ``peer`` is; of an unknown one nobody shares the domain."""
    return domains.get(peer) or Domain(peer, peer)


def width(peers: Iterable[PeerId], domains: Domains) -> tuple[int, int]:
    """Return over how many sites and hosts ``peers`` are spread."""
    found = [domain_of(peer, domains) for peer in peers]
    return len({d.site for d in found}), len({d.host for d in found})


def missing_copies(
    root: str,
    holders: Collection[PeerId],
    candidates: Collection[PeerId],
    domains: Domains,
    wanted: int,
) -> list[PeerId]:
    """Return who should make a copy now.

    As many as are missing; where none is, one more if that spreads the copies over
    more sites or hosts than the holders can: one of these is then one too many.
    """
    lacking = wanted - len(holders)
    others = set(candidates) - set(holders)
    order = spread(root, others, domains, holders, count=max(1, lacking))
    if lacking > 0 or not order:
        return order
    stay = spread(root, holders, domains, count=wanted)
    moved = [*stay[:-1], order[0]]
    return order if width(moved, domains) > width(stay, domains) else []


def spare_copies(
    root: str, holders: Collection[PeerId], domains: Domains, wanted: int
) -> list[PeerId]:
    """Return which of ``holders`` are not needed for ``wanted`` copies."""
    return spread(root, holders, domains, count=len(holders))[wanted:]
