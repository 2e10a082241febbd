"""A search in Kademlia's key space without I/O: whom to ask next, and who is nearest.

Peers and keys are points by SHA-256; their distance is the exclusive or. A walk asks the
nearest peers it knows for nearer ones until all of the k nearest have answered; shells
around it (``libp2p_kad.py``, the simulator) carry the questions.

Source: Maymounkov and Mazieres 2002, Kademlia, section 2.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import base58

from fabric.core.ids import PeerId

MAX_KNOWN_PEERS = 1000
"""Peers a walk may collect: a liar can name endless ones."""
MAX_PEER_ADDRS = 16
"""Addresses of one peer that are kept."""


def target_of(key: bytes) -> int:
    """Return the point of ``key``."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


@lru_cache(maxsize=8192)
def position(peer: PeerId) -> int:
    """Return the point of ``peer`` (cached: base58 takes 45 us)."""
    return target_of(base58.b58decode(peer))


class Walk:
    """One search towards a key: who is known, who was asked, what they said.

    Args:
        key: What is looked for.
        local: This peer, who is not asked.

    Attributes:
        known: Addresses by peer, empty for those already connected.
        asked: Peers asked, whether they answered or not.
        answered: Those that did.
        providers: Who is said to hold the key, in the order heard.
    """

    def __init__(self, key: bytes, local: PeerId) -> None:
        self.key = key
        self.local = local
        self.known: dict[PeerId, tuple[str, ...]] = {}
        self.asked: set[PeerId] = set()
        self.answered: set[PeerId] = set()
        self.providers: dict[PeerId, None] = {}
        self._target = target_of(key)

    def learn(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Remember a peer, unless it is ourselves or there are too many."""
        if peer != self.local and len(self.known) < MAX_KNOWN_PEERS:
            self.known.setdefault(peer, tuple(addrs[:MAX_PEER_ADDRS]))

    def hear(self, peer: PeerId, providers: Iterable[PeerId]) -> None:
        """``peer`` answered and named ``providers``; tell :meth:`learn` of the rest."""
        self.answered.add(peer)
        self.providers |= dict.fromkeys(providers)

    def has_found(self, enough: int | None) -> bool:
        """Whether more than ``enough`` providers were named: one may be ourselves."""
        return enough is not None and len(self.providers) > enough

    def next_batch(self, replicas: int, parallel: int) -> list[PeerId]:
        """Return the nearest peers not asked yet, among the ``replicas`` nearest."""
        alive = (p for p in self.known if p not in self.asked or p in self.answered)
        nearest = self.nearest(alive, replicas)
        return [p for p in nearest if p not in self.asked][:parallel]

    def nearest(self, peers: Iterable[PeerId], count: int) -> list[PeerId]:
        """Return the ``count`` of ``peers`` that are nearest to the key."""
        return sorted(peers, key=lambda peer: position(peer) ^ self._target)[:count]
