"""What a NAT does with our port, judged from what several observers saw.

Each observer tells the "ip:port" from which our connection reached it. All those
connections left from one local port, so (RFC 4787, section 4.1):

=========================  =========================================================
all saw the interface's    no NAT in between
all saw one other          endpoint-independent mapping: punching works from it
each saw another port      address- or port-dependent mapping ("symmetric"): every
                           target gets a mapping of its own; punching needs a guess
=========================  =========================================================

An observer may lie. One vote per IP address and few per network, and a verdict needs
more than half of the votes: one liar among three observers changes nothing, and one
against one honest observer gives no verdict that punching would rely on.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal

import msgspec

from fabric.core.ids import PeerId
from nat.addresses import AddressClass, classify, endpoint_of, parse_ip

MappingKind = Literal[
    "none", "endpoint_independent", "address_or_port_dependent", "unknown"
]
Allocation = Literal["", "sequential", "random"]

MAX_VOTES_PER_NETWORK = 2
"""Observers in one /24 or /48 may all belong to one tenant."""
MAX_STEP = 16
"""Ports between two mappings of a NAT that counts up while others use it too."""
MAX_EVIDENCE = 8


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One observer's word about one connection of ours.

    Attributes:
        observer: Who said so.
        observer_ip: Where we dialled it; "" when unknown.
        local: Our end of that connection, "ip:port".
        observed: What it saw, "ip:port".
        at: Monotonic seconds.
    """

    observer: PeerId
    observer_ip: str
    local: str
    observed: str
    at: float = 0.0


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict.

    Attributes:
        kind: See the module.
        external: "ip:port" of the mapping, where one is agreed on.
        external_ips: Public side of the NAT, most votes first.
        allocation: How a dependent mapping chooses ports.
        port_step: Typical distance of two mappings, when sequential.
        confidence: 0 to 1: the share that agrees, less the fewer there are.
        votes: How many independent observers counted.
        evidence: Who saw what, for people.
    """

    kind: MappingKind = "unknown"
    external: str | None = None
    external_ips: tuple[str, ...] = ()
    allocation: Allocation = ""
    port_step: int = 0
    confidence: float = 0.0
    votes: int = 0
    evidence: tuple[str, ...] = ()


def judge(observations: Sequence[Observation], own_ips: Collection[str]) -> Mapping:
    """Return the verdict of ``observations``, all of one local port.

    Args:
        observations: In the order in which the connections were made.
        own_ips: Addresses of our interfaces.
    """
    votes = _votes(_widest(observations))
    if not votes:
        return Mapping()
    seen = [vote.observed for vote in votes]
    counted = Counter(seen)
    # among equals the first seen, which a later liar cannot be
    external, agreeing = max(counted.items(), key=lambda item: item[1])
    base = Mapping(external_ips=_ips(seen), votes=len(votes), evidence=_evidence(votes))
    if agreeing >= 2 and 2 * agreeing > len(votes):
        same = _same_as_interface(external, votes, own_ips)
        return msgspec.structs.replace(
            base,
            kind="none" if same else "endpoint_independent",
            external=external,
            confidence=_confidence(agreeing, len(votes)),
        )
    return _dependent(base, seen)


def _dependent(base: Mapping, seen: Sequence[str]) -> Mapping:
    """Return the verdict when no address has a majority."""
    ips = Counter(_ip(text) for text in seen)
    ip, behind = ips.most_common(1)[0]
    ports = [end[1] for text in seen if _ip(text) == ip and (end := endpoint_of(text))]
    distinct = len(set(ports))
    # two observers that name different IPs: a pool of addresses, or a liar
    if distinct < 2 or 2 * behind <= len(seen):
        return base
    allocation, step = allocation_of(ports)
    return msgspec.structs.replace(
        base,
        kind="address_or_port_dependent",
        allocation=allocation,
        port_step=step,
        confidence=_confidence(distinct, len(seen)),
    )


def allocation_of(ports: Sequence[int]) -> tuple[Allocation, int]:
    """Return how a NAT chose ``ports``, in any order, and its step.

    Who answers first was not connected to first, so only the distances tell.
    """
    gaps = [after - before for before, after in pairwise(sorted(set(ports)))]
    steps = [gap for gap in gaps if gap <= MAX_STEP]
    # one large gap is the end of the NAT's range, or other clients' ports
    if len(steps) * 2 <= len(gaps):
        return "random", 0
    return "sequential", sorted(steps)[len(steps) // 2]


def _widest(observations: Sequence[Observation]) -> list[Observation]:
    """Return what public observers saw, if there are any, and else all.

    A peer on the same LAN sees us before the NAT.
    """
    public = [
        each
        for each in observations
        if classify(each.observer_ip) is AddressClass.PUBLIC
    ]
    return public or list(observations)


def _votes(observations: Sequence[Observation]) -> list[Observation]:
    """Return one observation per IP and few per network; per peer if all share one IP.

    Peers that share an IP (one house, or one machine in a test) can all be one liar.
    """
    readable = [each for each in observations if endpoint_of(each.observed)]
    by_ip = len({each.observer_ip for each in readable}) > 1
    voters: dict[str, list[Observation]] = {}
    for each in readable:
        voter = each.observer_ip if by_ip else each.observer
        voters.setdefault(voter, []).append(each)
    votes = [_most_common(group) for group in voters.values()]
    networks = [_network(vote.observer_ip) for vote in votes]
    if len(set(networks)) < 2:
        return votes
    return [
        vote
        for at, vote in enumerate(votes)
        if networks[:at].count(networks[at]) < MAX_VOTES_PER_NETWORK
    ]


def _most_common(observations: Sequence[Observation]) -> Observation:
    """Return the first of those that say what most say."""
    counted = Counter(each.observed for each in observations)
    return max(observations, key=lambda each: counted[each.observed])


def _network(ip: str) -> str:
    parsed = parse_ip(ip)
    if parsed is None:
        return ip
    bits = 24 if parsed.version == 4 else 48
    return str(ipaddress.ip_network(f"{parsed}/{bits}", strict=False))


def _same_as_interface(
    external: str, votes: Sequence[Observation], own_ips: Collection[str]
) -> bool:
    """Return whether nothing translated: the observed address is our own end."""
    locals_ = {endpoint_of(vote.local) for vote in votes if vote.observed == external}
    end = endpoint_of(external)
    ports = {local[1] for local in locals_ if local is not None}
    return end is not None and str(end[0]) in own_ips and end[1] in ports


def _confidence(agreeing: int, votes: int) -> float:
    """Return the agreeing share, halved for every observer fewer than infinite."""
    return round(agreeing / votes * (1 - 0.5**agreeing), 3)


def _ip(text: str) -> str:
    end = endpoint_of(text)
    return str(end[0]) if end is not None else ""


def _ips(seen: Sequence[str]) -> tuple[str, ...]:
    return tuple(ip for ip, _ in Counter(_ip(text) for text in seen).most_common())


def _evidence(votes: Sequence[Observation]) -> tuple[str, ...]:
    return tuple(
        f"{vote.observer_ip or vote.observer} saw {vote.observed}"
        for vote in votes[:MAX_EVIDENCE]
    )
