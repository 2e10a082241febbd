"""What is said on the local network, and what of it is believed: the core of mDNS.

    <32 random characters>._p2p._udp.local  TXT  "dnsaddr=/ip4/../tcp/../p2p/<peer>"
                                                 "fabric=<tag of the mesh>"

The tag is a keyed hash: who knows the mesh's id recognises it, others learn nothing
from it. Everybody on the network hears it and can repeat it, so what comes in is
bounded in size, number and rate, and is never more than a hint where to dial.

Sources: libp2p specs, discovery/mdns.md; RFC 6763 section 6 (TXT records).
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import MeshId, PeerId, public_key_of
from nat.addresses import AddressClass, classify, endpoint_of

SERVICE = "_p2p._udp.local."
TAG_CONTEXT = "peerfabric 2026-01 mdns tag of a mesh"
TAG_CHARS = 16
NAME_CHARS = 32
"""Spec, "Definitions": peer-name is random, at least 32 characters, below 64."""
MAX_TEXT_BYTES = 1200
"""RFC 6763 section 6.1: a TXT record should fit one Ethernet packet with the rest."""
MAX_STRINGS = 64
MAX_ADDRS = 8
MAX_PEERS = 256
"""Peers believed at once; a LAN of more members finds the rest through these."""
MAX_NEW_PER_WINDOW = 32
WINDOW_SECONDS = 10.0
REPEAT_SECONDS = 5.0
"""One peer's announcement is looked at again after this."""
FORGET_SECONDS = 4500.0
"""TTL of a TXT record (RFC 6762 section 10): after that it must be said again."""

_ADDR_KEY = b"dnsaddr="
_TAG_KEY = b"fabric="


def tag_of(mesh: MeshId) -> str:
    """Return what marks announcements of members of ``mesh``."""
    digest = blake3(mesh.encode(), derive_key_context=TAG_CONTEXT)
    return digest.hexdigest()[:TAG_CHARS]


def new_name(rng: random.Random) -> str:
    """Return a peer-name: it must be unique and must not be the PeerId (spec)."""
    return "".join(rng.choices(string.ascii_lowercase + string.digits, k=NAME_CHARS))


class Announcement(msgspec.Struct, frozen=True):
    """A peer of our mesh on this network.

    Attributes:
        peer: Who it says it is.
        addrs: Multiaddrs ending in its id.
    """

    peer: PeerId
    addrs: tuple[str, ...]


def local_addrs(addrs: Iterable[str], *, loopback: bool = False) -> tuple[str, ...]:
    """Return those of ``addrs`` that mean something to a neighbour.

    Circuits and names are left out, and so are loopback addresses (spec, "Issues"),
    unless the announcement itself goes out on the loopback interface.
    """
    good = {AddressClass.PRIVATE, AddressClass.CGNAT, AddressClass.PUBLIC}
    good |= {AddressClass.LINK_LOCAL} | ({AddressClass.LOOPBACK} if loopback else set())
    found = []
    for addr in addrs:
        end = endpoint_of(addr)
        if end is not None and classify(end[0]) in good and addr not in found:
            found.append(addr)
    return tuple(found[:MAX_ADDRS])


def encode_text(addrs: Sequence[str], tag: str) -> bytes:
    """Return the TXT record's data: strings, each after its length in one byte."""
    strings = [_TAG_KEY + tag.encode()]
    strings += [_ADDR_KEY + addr.encode() for addr in addrs]
    out = bytearray()
    for each in strings:
        if len(each) < 256 and len(out) + len(each) < MAX_TEXT_BYTES:
            out.append(len(each))
            out += each
    return bytes(out)


def read_text_untrusted(
    data: bytes, tag: str, *, loopback: bool = False
) -> Announcement | None:
    """Return the announcement in a TXT record, or None if it is not of our mesh.

    Raises:
        RemoteProtocolError: malformed, or it speaks for several peers.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise RemoteProtocolError(f"TXT record of {len(data)} B > {MAX_TEXT_BYTES} B")
    strings = _strings_untrusted(data)
    if _TAG_KEY + tag.encode() not in strings:
        return None
    texts = [s.removeprefix(_ADDR_KEY) for s in strings if s.startswith(_ADDR_KEY)]
    try:
        addrs = [text.decode("ascii") for text in texts]
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError("an announced address is not ASCII") from exc
    names = {addr.rpartition("/p2p/")[2] for addr in addrs}
    if len(names) != 1:
        raise RemoteProtocolError(f"an announcement for {len(names)} peers")
    peer = PeerId(names.pop())
    public_key_of(peer)
    good = (addr for addr in addrs if addr.isprintable() and addr.count("/") == 6)
    kept = local_addrs(good, loopback=loopback)
    return Announcement(peer, kept) if kept else None


def _strings_untrusted(data: bytes) -> list[bytes]:
    strings: list[bytes] = []
    at = 0
    while at < len(data):
        size = data[at]
        each = data[at + 1 : at + 1 + size]
        if len(each) != size or len(strings) == MAX_STRINGS:
            raise RemoteProtocolError("a TXT record is truncated or has many strings")
        strings.append(each)
        at += 1 + size
    return strings


@dataclass
class _Seen:
    addrs: tuple[str, ...]
    at: float


class Neighbours:
    """Which announcements are passed on: bounded in number and in rate.

    Args:
        own: Our id, which we hear too.

    Attributes:
        dropped: Announcements over a bound.
    """

    def __init__(self, own: PeerId) -> None:
        self.dropped = 0
        self._own = own
        self._seen: dict[PeerId, _Seen] = {}
        self._window_at = float("-inf")
        self._window_count = 0

    def __len__(self) -> int:
        """Return how many peers were heard of lately."""
        return len(self._seen)

    def accept(self, heard: Announcement, now: float) -> bool:
        """Return whether ``heard`` says something new and is within the bounds."""
        if heard.peer == self._own:
            return False
        known = self._seen.get(heard.peer)
        if known is not None:
            if known.addrs == heard.addrs:
                known.at = now
                return False
            if now - known.at < REPEAT_SECONDS:
                self.dropped += 1
                return False
        elif not self._has_room(now):
            self.dropped += 1
            return False
        self._seen[heard.peer] = _Seen(heard.addrs, now)
        return True

    def _has_room(self, now: float) -> bool:
        if now - self._window_at >= WINDOW_SECONDS:
            self._window_at, self._window_count = now, 0
        if self._window_count >= MAX_NEW_PER_WINDOW:
            return False
        if len(self._seen) >= MAX_PEERS:
            self._seen = {
                p: s for p, s in self._seen.items() if now - s.at < FORGET_SECONDS
            }
        if len(self._seen) >= MAX_PEERS:
            return False
        self._window_count += 1
        return True
