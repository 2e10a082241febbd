"""The addresses of one peer with their history: pure, bounded, merged from everybody.

Half of the room is for addresses that worked, the latest success first: nothing that
anybody says can push them out. The other half is for what was said last, a quarter of
the room at most for hints of the network, so that these cannot push out the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Annotated, Literal

import msgspec

from fabric.core.ids import PeerId
from fabric.net.traversal_api import ConnectionInfo

MAX_ADDRS = 16
"""Addresses kept per peer, which are also those dialled at once."""
MAX_PROVEN = 8
"""Of these, addresses that have worked."""
MAX_HINTED = 4
"""Of these, addresses known from hints only, which never worked."""
MAX_ADDR_CHARS = 300
"""A circuit address through a relay with a long DNS name; token and file hold it."""

Source = Literal["invite", "config", "record", "mdns", "rendezvous", "observed"]
"""Where an address was learnt: an invite, our configuration, the peer's signed
membership record, the LAN, a rendezvous point, or what the peer told us itself."""
HINTS: frozenset[Source] = frozenset({"mdns", "rendezvous"})
"""Sources that anybody on the network can make say anything."""

AddrText = Annotated[str, msgspec.Meta(min_length=2, max_length=MAX_ADDR_CHARS)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
UnixSeconds = Annotated[float, msgspec.Meta(ge=0, lt=2**40)]


class KnownAddr(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One address.

    Attributes:
        addr: Multiaddr ending in ``/p2p/<peer>``.
        source: Who said it first.
        seen: When somebody last said it, Unix seconds.
        succeeded: When it last worked, Unix seconds; 0 for never.
        successes: Dials that it answered.
        failures: Dials that it did not.
    """

    addr: AddrText
    source: Source
    seen: UnixSeconds = 0.0
    succeeded: UnixSeconds = 0.0
    successes: Count = 0
    failures: Count = 0


def addr_untrusted(peer: PeerId, text: str) -> str | None:
    """Return ``text`` as an address of ``peer``, or None if it cannot be one.

    Only the form is judged; the dialer parses it, and a wrong one fails there.
    """
    if not 2 <= len(text) <= MAX_ADDR_CHARS or not text.startswith("/"):
        return None
    if not text.isascii() or not text.isprintable() or " " in text:
        return None
    head, mark, named = text.rpartition("/p2p/")
    if not mark or "/p2p-circuit" in named:
        return (
            f"{text}/p2p/{peer}"
            if len(text) + 5 + len(peer) <= MAX_ADDR_CHARS
            else None
        )
    return text if named == peer and head else None


class AddrBook:
    """The addresses of one peer.

    Args:
        peer: Whose.
    """

    def __init__(self, peer: PeerId) -> None:
        self._peer = peer
        self._addrs: dict[str, KnownAddr] = {}
        self._record: tuple[str, ...] = ()
        self._order = 0
        self._rank: dict[str, int] = {}

    @property
    def ever_worked(self) -> bool:
        """Whether any address has answered."""
        return any(known.successes for known in self._addrs.values())

    @property
    def last_success(self) -> float:
        """When the peer last answered at any address, Unix seconds."""
        return max((known.succeeded for known in self._addrs.values()), default=0.0)

    def all(self) -> tuple[KnownAddr, ...]:
        """Return copies of what is known, best first."""
        return tuple(msgspec.structs.replace(known) for known in self._ranked())

    def best(self) -> tuple[str, ...]:
        """Return the multiaddrs, best first."""
        return tuple(known.addr for known in self._ranked())

    def merge(self, found: Iterable[str], source: Source, wall: float) -> bool:
        """Take in what ``source`` says; return whether an address is new."""
        said = tuple(islice(found, MAX_ADDRS))
        if source == "record":
            if said == self._record:
                return False  # the same record again: nobody has said anything new
            self._record = said
        checked = (addr_untrusted(self._peer, text) for text in said)
        told = dict.fromkeys(addr for addr in checked if addr is not None)
        before = set(self._addrs)
        self._order += 1
        for place, addr in enumerate(told):
            known = self._addrs.setdefault(addr, KnownAddr(addr=addr, source=source))
            if known.source in HINTS:
                known.source = source
            known.seen = max(known.seen, wall)
            self._rank[addr] = self._order * MAX_ADDRS - place
        self._trim()
        return not before.issuperset(self._addrs)

    def restore(self, remembered: Iterable[KnownAddr]) -> None:
        """Take in what an earlier run knew; what we know already stays."""
        for known in remembered:
            addr = addr_untrusted(self._peer, known.addr)
            if addr is not None and addr not in self._addrs:
                self._addrs[addr] = msgspec.structs.replace(known, addr=addr)
        self._trim()

    def on_success(self, worked: Collection[str], wall: float) -> None:
        """Note that these addresses answered."""
        for text in worked:
            addr = addr_untrusted(self._peer, text)
            if addr is None:
                continue
            known = self._addrs.setdefault(
                addr, KnownAddr(addr=addr, source="observed", seen=wall)
            )
            known.successes += 1
            known.succeeded = max(known.succeeded, wall)
            known.seen = max(known.seen, wall)
        self._trim()

    def on_failure(self, failed: Collection[str]) -> None:
        """Note that these addresses did not answer."""
        for addr in failed:
            if addr in self._addrs:
                self._addrs[addr].failures += 1

    def _ranked(self) -> list[KnownAddr]:
        """Return what is kept: proven ones by last success, then the latest said."""
        proven = sorted(
            (known for known in self._addrs.values() if known.successes),
            key=lambda known: (-known.succeeded, known.failures, known.addr),
        )
        kept = proven[:MAX_PROVEN]
        names = {known.addr for known in kept}
        rest = sorted(
            (known for known in self._addrs.values() if known.addr not in names),
            key=lambda known: (
                -self._rank.get(known.addr, 0),
                -known.seen,
                known.failures,
                known.addr,
            ),
        )
        hinted = [k for k in rest if k.source in HINTS and not k.successes]
        room = MAX_ADDRS - len(kept) - min(len(hinted), MAX_HINTED)
        told = [
            known for known in rest if known.source not in HINTS or known.successes
        ][:room]
        return kept + told + hinted[:MAX_HINTED]

    def _trim(self) -> None:
        kept = {known.addr for known in self._ranked()}
        for addr in [addr for addr in self._addrs if addr not in kept]:
            del self._addrs[addr]
        self._rank = {a: place for a, place in self._rank.items() if a in kept}


def answered(
    addrs: Sequence[str], connections: Iterable[ConnectionInfo]
) -> tuple[str, ...]:
    """Return those of ``addrs`` that lead to one of our live ``connections``.

    A connection that the peer opened proves none: its source port is not listened on.
    """
    found = []
    for info in connections:
        if not info.outbound or info.kind == "punched":
            continue
        if info.kind == "relay":
            through = f"/p2p/{info.relay}/p2p-circuit"
            found += [addr for addr in addrs if through in addr]
        else:
            host, _, port = info.remote.rpartition(":")
            bare = host.strip("[]").removeprefix("::ffff:")
            version = "ip6" if ":" in bare else "ip4"
            start = f"/{version}/{bare}/tcp/{port}/p2p/"
            found += [a for a in addrs if a.startswith(start) and "circuit" not in a]
    return tuple(dict.fromkeys(found))
