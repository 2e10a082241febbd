"""Whether others can reach this peer, and which addresses to tell them: pure.

An address is *confirmed* when enough servers dialled it, more than failed to. What a
confirmation is worth depends on where the address comes from:

* an interface's, one that a router mapped for us, or one the operator announced: others
  can dial it too, so this peer is public;
* one that observers saw behind a NAT: servers we had contacted before may only have
  come through a hole that our own connections made (address-dependent filtering, RFC
  4787, section 5). Such a peer is private, with the hint ``reachable_by_contacted``,
  and keeps its relay reservations.

"Others" are the peers that reach farthest: public ones if there are any, else those of
the site (a mesh without internet), else of the host (a test).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from fabric.core.ids import PeerId
from nat.addresses import AddressClass, classify, endpoint_of, parse_ip
from nat.multiaddr_bytes import tcp_multiaddr
from nat.reachability.autonat import AddressVerdict
from nat.reachability.config import ReachabilityConfig
from nat.reachability.observed_mapping import Mapping as NatMapping

Status = Literal["public", "private", "unknown"]
Confidence = Literal["none", "low", "medium", "high"]
Source = Literal["announced", "mapped", "interface", "observed"]
Filtering = Literal["address_dependent", "address_and_port_dependent", "unknown"]
"""As :data:`nat.punch.facts.Filtering`; "address_dependent" may be more open still."""
REACHABLE_BY_CONTACTED = "reachable_by_contacted"

_REACH = [AddressClass.PUBLIC, AddressClass.CGNAT, AddressClass.PRIVATE]
_REACH += [AddressClass.LINK_LOCAL, AddressClass.LOOPBACK]
"""Classes, the farthest first."""


class Candidate(msgspec.Struct, frozen=True):
    """An address that may be ours to others."""

    address: str
    source: Source


class AddressReport(msgspec.Struct, frozen=True, kw_only=True):
    """What servers found about one candidate.

    Attributes:
        address: Multiaddr.
        source: Where it comes from.
        reached: Independent servers that dialled it.
        failed: Those that could not.
        reasons: What was said, for people.
    """

    address: str
    source: Source
    reached: int = 0
    failed: int = 0
    reasons: tuple[str, ...] = ()


class Reachability(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict.

    Attributes:
        status: Whether others can open connections to this peer.
        confidence: By how many agree.
        agreeing: Independent servers, or observers, behind it.
        scope: How far "others" are.
        addresses: Confirmed ones, best first; empty unless public.
        hint: ``reachable_by_contacted`` or nothing.
        reason: Why, for people.
        reports: Each candidate with what servers found.
        mapping: What the NAT does, if there is one.
        ip6_only: They reach this peer over IPv6 alone though it has IPv4 too: those
            without IPv6 need a relay.
    """

    status: Status = "unknown"
    confidence: Confidence = "none"
    agreeing: int = 0
    scope: AddressClass = AddressClass.PUBLIC
    addresses: tuple[str, ...] = ()
    hint: str = ""
    reason: str = "nobody was asked yet"
    reports: tuple[AddressReport, ...] = ()
    mapping: NatMapping = NatMapping()
    ip6_only: bool = False

    @property
    def open_to_all(self) -> bool:
        """Whether everybody of ``scope`` reaches us, whatever IP they have."""
        return self.status == "public" and not self.ip6_only

    @property
    def open_to_the_internet(self) -> bool:
        """Whether the world reaches us, and not only the site or this host."""
        return self.open_to_all and self.scope is AddressClass.PUBLIC


def farther(ip: str, scope: AddressClass) -> bool:
    """Return whether a peer at ``ip`` is farther away than ``scope``."""
    kind = classify(ip)
    return kind in _REACH and _REACH.index(kind) < _REACH.index(scope)


def scope_of(server_ips: Iterable[str]) -> AddressClass:
    """Return how far the farthest of the servers are; public when there are none."""
    kinds = {classify(ip) for ip in server_ips}
    return next((kind for kind in _REACH if kind in kinds), AddressClass.PUBLIC)


def candidates(
    listening: Sequence[str],
    mapped: Sequence[str],
    announced: Sequence[str],
    mapping: NatMapping,
    scope: AddressClass,
) -> tuple[Candidate, ...]:
    """Return the addresses that others within ``scope`` may reach us at, best first.

    Args:
        listening: Multiaddrs of our interfaces with the listening port.
        mapped: Multiaddrs that routers map to us.
        announced: Multiaddrs that the operator set.
        mapping: What observers agree on.
        scope: Private addresses are none of a public server's business.
    """
    found: dict[str, Candidate] = {}

    def add(addresses: Iterable[str], source: Source) -> None:
        for address in addresses:
            end = endpoint_of(address)
            if end is not None and classify(end[0]) is scope:
                plain = tcp_multiaddr(str(end[0]), end[1])
                found.setdefault(plain, Candidate(plain, source))

    add(announced, "announced")
    add(mapped, "mapped")
    add(listening, "interface")
    if mapping.external is not None:
        add([mapping.external], "observed")
    return tuple(found.values())


def judge(
    asked: Sequence[Candidate],
    verdicts: Mapping[PeerId, Sequence[AddressVerdict]],
    server_ips: Mapping[PeerId, str],
    mapping: NatMapping,
    config: ReachabilityConfig,
    own_ips: Collection[str] = (),
) -> Reachability:
    """Return the verdict of one round.

    Args:
        asked: Candidates, best first.
        verdicts: What each server said.
        server_ips: Where each server is; those behind one IP have one vote.
        mapping: What observers agree on.
        config: How many must agree.
        own_ips: Addresses of our interfaces.
    """
    reports = tuple(_report(each, verdicts, server_ips) for each in asked)
    base = Reachability(
        reports=reports, mapping=mapping, scope=scope_of(server_ips.values())
    )
    confirmed = [each for each in reports if _confirmed(each, config)]
    own = [each for each in confirmed if each.source != "observed"]
    if own:
        agreeing = max(each.reached for each in own)
        return msgspec.structs.replace(
            base,
            status="public",
            agreeing=agreeing,
            confidence=_confidence(agreeing),
            addresses=tuple(each.address for each in own),
            ip6_only=_ip6_only([each.address for each in own], own_ips),
            reason=f"{_servers(agreeing)} connected to {own[0].address}",
        )
    return _not_public(base, bool(confirmed), own_ips)


def _ip6_only(confirmed: Sequence[str], own_ips: Collection[str]) -> bool:
    """Return whether only IPv6 is confirmed, of a peer that has IPv4 as well."""
    ends = [end for end in map(endpoint_of, confirmed) if end is not None]
    nearby = (AddressClass.LOOPBACK, AddressClass.LINK_LOCAL)
    own = (parse_ip(ip) for ip in own_ips if classify(ip) not in nearby)
    has_ip4 = any(ip is not None and ip.version == 4 for ip in own)
    return has_ip4 and all(end[0].version == 6 for end in ends)


def _not_public(
    base: Reachability, contacted: bool, own_ips: Collection[str]
) -> Reachability:
    """Return private, if something says so, else unknown."""
    hint = REACHABLE_BY_CONTACTED if contacted else ""
    own = [each for each in base.reports if each.source != "observed"]
    refuted = [each for each in own if each.failed > each.reached]
    if own and len(refuted) == len(own):
        agreeing = min(each.failed for each in refuted)
        reason = f"{_servers(agreeing)} could not connect to {refuted[0].address}"
    elif not own and _behind_nat(base.mapping, own_ips):
        agreeing = base.mapping.votes
        external = base.mapping.external_ips[0]
        reason = f"behind a NAT ({external}), no router maps a port to us"
    else:
        return msgspec.structs.replace(base, hint=hint, reason=_why_unknown(base))
    return msgspec.structs.replace(
        base,
        status="private",
        agreeing=agreeing,
        confidence=_confidence(agreeing),
        hint=hint,
        reason=reason,
    )


def _servers(number: int) -> str:
    return "1 server" if number == 1 else f"{number} servers"


def _why_unknown(base: Reachability) -> str:
    if not base.reports:
        return f"no {base.scope} address is known, and nobody observed us"
    if not any(each.reached or each.failed for each in base.reports):
        return "no server gave an answer"
    return "servers disagree"


def _behind_nat(mapping: NatMapping, own_ips: Collection[str]) -> bool:
    return bool(mapping.external_ips) and mapping.external_ips[0] not in own_ips


def _report(
    candidate: Candidate,
    verdicts: Mapping[PeerId, Sequence[AddressVerdict]],
    server_ips: Mapping[PeerId, str],
) -> AddressReport:
    """Return the votes on one candidate: one per IP, or per server if all share one."""
    by_ip = len(set(server_ips.values())) > 1
    votes: dict[str, Counter[bool]] = {}
    reasons = []
    for server, said in verdicts.items():
        for verdict in said:
            if endpoint_of(verdict.address) != endpoint_of(candidate.address):
                continue
            reasons.append(f"{server_ips.get(server, server)}: {verdict.reason}")
            if verdict.reached is not None:
                voter = server_ips.get(server, server) if by_ip else server
                votes.setdefault(voter, Counter())[verdict.reached] += 1
    return AddressReport(
        address=candidate.address,
        source=candidate.source,
        reached=sum(vote[True] > vote[False] for vote in votes.values()),
        failed=sum(vote[False] >= vote[True] for vote in votes.values()),
        reasons=tuple(reasons),
    )


def _confirmed(report: AddressReport, config: ReachabilityConfig) -> bool:
    """Return whether enough reached it: where fewer answered, all of them."""
    needed = min(config.min_agreeing, report.reached + report.failed)
    return report.reached >= max(1, needed) and report.reached > report.failed


def _confidence(agreeing: int) -> Confidence:
    if agreeing >= 3:
        return "high"
    return "medium" if agreeing == 2 else "low"


def filtering_of(verdict: Reachability) -> Filtering:
    """Return what the NAT lets in, judged from dial-backs to the observed address.

    They come from servers that we contacted, from ports that we did not.
    """
    for each in verdict.reports:
        if each.source == "observed" and each.reached != each.failed:
            opened = each.reached > each.failed
            return "address_dependent" if opened else "address_and_port_dependent"
    return "unknown"


def announced_addrs(
    verdict: Reachability,
    listening: Sequence[str],
    circuits: Sequence[str],
    announced: Sequence[str],
    config: ReachabilityConfig,
) -> tuple[str, ...]:
    """Return the multiaddrs to announce, best first, without our own id.

    What the operator announces always is; then what is confirmed; circuits unless all
    reach us; what is not refuted, while nothing is known; and addresses of the site,
    for peers of the same one.
    """
    refuted = {each.address for each in verdict.reports if each.failed > each.reached}
    ends = [(addr, endpoint_of(addr)) for addr in listening]
    kinds = [(addr, classify(end[0])) for addr, end in ends if end is not None]
    untested = [
        each.address
        for each in verdict.reports
        if each.source != "observed" and each.address not in refuted
    ]
    open_ = [a for a, kind in kinds if kind is AddressClass.PUBLIC and a not in refuted]
    site = (AddressClass.PRIVATE, AddressClass.CGNAT)
    lan = [addr for addr, kind in kinds if kind in site] if config.announce_lan else []
    parts = [*announced, *verdict.addresses]
    if not verdict.open_to_all:
        parts += circuits
    if verdict.status == "unknown":
        parts += untested + open_
    parts += lan
    if not parts:
        parts = [addr for addr, _ in kinds]  # nothing but the host itself
    return tuple(dict.fromkeys(parts))[: config.max_announced]
