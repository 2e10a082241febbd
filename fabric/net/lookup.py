"""A search in Kademlia's key space without I/O: whom to ask next, and who is nearest.

Peers and keys are points by SHA-256; their distance is the exclusive or. A walk asks
the nearest peers it knows for nearer ones until all of the k nearest have answered;
shells around it (``libp2p_kad.py``, the simulator) carry the questions.

Source: Maymounkov and Mazieres 2002, Kademlia, section 2.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import nsmallest

import base58

from fabric.core.ids import PeerId

MAX_KNOWN_PEERS = 1000
"""Peers a walk may collect: a liar can name endless ones."""
MAX_PEER_ADDRS = 16
"""Addresses of one peer that are kept."""
PATIENCE_SECONDS = 1.5
"""A dial over half the world and an answer take less, unless the peer is not there."""


def target_of(key: bytes) -> int:
    """Return the point of ``key``."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


@lru_cache(maxsize=8192)
def position(peer: PeerId) -> int:
    """Return the point of ``peer`` (cached: base58 takes 45 us)."""
    return target_of(base58.b58decode(peer))


class Walk:
    """One search towards a key: who is known, who was asked, what they said.

    Ask whom :meth:`take` names, tell :meth:`hear` or :meth:`miss`, until
    :meth:`is_over`. Who is silent for ``PATIENCE_SECONDS`` is passed over: the next
    nearest take its place, and nobody waits for a machine that is switched off.

    Args:
        key: What is looked for.
        local: This peer, who is not asked.
        replicas: k, the nearest peers that have to answer.
        parallel: Alpha, questions at once.
        enough: End when more providers than this were named (one may be ourselves).

    Attributes:
        known: Addresses by peer, empty for those already connected.
        answered: Peers that did.
        providers: Who is said to hold the key, in the order heard.
    """

    def __init__(
        self,
        key: bytes,
        local: PeerId,
        *,
        replicas: int,
        parallel: int,
        enough: int | None = None,
    ) -> None:
        self.key = key
        self.known: dict[PeerId, tuple[str, ...]] = {}
        self.answered: set[PeerId] = set()
        self.providers: dict[PeerId, None] = {}
        self._local = local
        self._replicas = replicas
        self._parallel = parallel
        self._enough = enough
        self._target = target_of(key)
        self._missed: set[PeerId] = set()
        self._pending: dict[PeerId, float] = {}

    def learn(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Remember a peer, unless it is ourselves or there are too many."""
        if peer != self._local and len(self.known) < MAX_KNOWN_PEERS:
            self.known.setdefault(peer, tuple(addrs[:MAX_PEER_ADDRS]))

    def take(self, now: float) -> list[PeerId]:
        """Return whom to ask now; each is told of with :meth:`hear` or :meth:`miss`."""
        if self._has_found():
            return []
        room = self._parallel - len(self._waited_for(now))
        chosen = self._unasked(now)[: max(0, room)]
        self._pending.update(dict.fromkeys(chosen, now))
        return chosen

    def hear(self, peer: PeerId, providers: Iterable[PeerId]) -> None:
        """``peer`` named ``providers``; first :meth:`learn` of the others it named."""
        self._pending.pop(peer, None)
        self.answered.add(peer)
        self.providers |= dict.fromkeys(providers)

    def miss(self, peer: PeerId) -> None:
        """``peer`` does not answer."""
        self._pending.pop(peer, None)
        self._missed.add(peer)

    def is_over(self, now: float) -> bool:
        """Whether no answer that is still worth waiting for would help."""
        if self._has_found():
            return True
        return not self._waited_for(now) and not self._unasked(now)

    def next_timeout(self, now: float) -> float:
        """Return when to :meth:`take` again although nobody has answered."""
        waited = [self._pending[peer] for peer in self._waited_for(now)]
        return min(waited, default=now) + PATIENCE_SECONDS

    def _has_found(self) -> bool:
        return self._enough is not None and len(self.providers) > self._enough

    def _waited_for(self, now: float) -> set[PeerId]:
        pending = self._pending.items()
        return {peer for peer, at in pending if now < at + PATIENCE_SECONDS}

    def _unasked(self, now: float) -> list[PeerId]:
        """Return, nearest first, those of the k nearest that were not asked yet."""
        passed_over = self._missed | (self._pending.keys() - self._waited_for(now))
        alive = (p for p in self.known if p not in passed_over or p in self.answered)
        asked = self.answered | self._pending.keys()
        return [p for p in self.nearest(alive, self._replicas) if p not in asked]

    def nearest(self, peers: Iterable[PeerId], count: int) -> list[PeerId]:
        """Return the ``count`` of ``peers`` that are nearest to the key."""
        return nsmallest(count, peers, key=lambda peer: position(peer) ^ self._target)
