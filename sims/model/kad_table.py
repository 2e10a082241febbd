"""What a process answers to searches of providers: a model of py-libp2p's server.

Buckets of 20 by distance, in which the oldest living stay; records are kept in memory
and end with the process. The periodic refresh of the table is left out.
"""

from __future__ import annotations

from collections.abc import Callable

from fabric.core.ids import PeerId
from fabric.net.lookup import position

_BUCKET = 20
"""Of py-libp2p's routing table, and peers in an answer."""


class Table:
    """What one process knows for others: peers near and far, and records.

    Args:
        own: Whose it is.

    Attributes:
        records: Who announced to hold a key.
        connected: Of whom it took note already.
    """

    def __init__(self, own: PeerId) -> None:
        self._own = position(own)
        self._buckets: dict[int, list[PeerId]] = {}
        self.records: dict[bytes, dict[PeerId, None]] = {}
        self.connected: frozenset[PeerId] = frozenset()

    def add(self, peer: PeerId, lives: Callable[[PeerId], bool]) -> None:
        """Note ``peer``; the oldest of a full bucket makes room if it is gone."""
        place = (position(peer) ^ self._own).bit_length()
        bucket = self._buckets.setdefault(place, [])
        if peer in bucket:
            bucket.remove(peer)
        elif len(bucket) >= _BUCKET:
            if lives(bucket[0]):
                return
            del bucket[0]
        bucket.append(peer)

    def remove(self, peer: PeerId) -> None:
        """Forget a peer that did not answer."""
        bucket = self._buckets.get((position(peer) ^ self._own).bit_length(), [])
        if peer in bucket:
            bucket.remove(peer)

    def nearest(self, target: int) -> list[PeerId]:
        """Return the known peers nearest to ``target``."""
        known = (peer for bucket in self._buckets.values() for peer in bucket)
        return sorted(known, key=lambda p: position(p) ^ target)[:_BUCKET]
