"""The rates of a relay: bytes of circuits, and requests of peers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from fabric.core.ids import PeerId
from nat.relay.config import RelayConfig
from nat.relay.token_bucket import TokenBucket

MAX_REQUESTERS = 1024
"""Peers, or addresses, whose request rate is remembered."""


class ByteBudget:
    """Bytes per second of each circuit, of each peer, of strangers, and in all."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._all = self._bucket(config.max_bytes_per_second)
        self._strangers = self._bucket(config.stranger_bytes_per_second)
        self._circuits: dict[Hashable, TokenBucket] = {}
        self._peers: dict[PeerId, TokenBucket] = {}
        self._num_open: Counter[PeerId] = Counter()

    def _bucket(self, rate: float) -> TokenBucket:
        return TokenBucket(rate, rate * self._config.burst_seconds)

    def open(self, source: PeerId, target: PeerId, circuit: Hashable) -> None:
        """Keep a bucket for ``circuit``, and for its ends while they have circuits."""
        config = self._config
        self._circuits[circuit] = self._bucket(config.max_bytes_per_second_per_circuit)
        for peer in (source, target):
            self._num_open[peer] += 1
            if peer not in self._peers:
                rate = config.max_bytes_per_second_per_peer
                self._peers[peer] = self._bucket(rate)

    def close(self, source: PeerId, target: PeerId, circuit: Hashable) -> None:
        """Forget ``circuit``.

        A peer's bucket goes with its last circuit: opening anew gains it one burst, and
        how often it may open is limited.
        """
        del self._circuits[circuit]
        for peer in (source, target):
            self._num_open[peer] -= 1
            if not self._num_open[peer]:
                del self._num_open[peer], self._peers[peer]

    def take(
        self,
        source: PeerId,
        target: PeerId,
        circuit: Hashable,
        num_bytes: int,
        now: float,
        *,
        stranger: bool,
    ) -> float:
        """Take from every bucket that ``circuit`` draws on; return the longest wait."""
        buckets = [self._circuits[circuit], self._all]
        buckets += [self._peers[source], self._peers[target]]
        if stranger:
            buckets.append(self._strangers)
        return max(bucket.take(num_bytes, now) for bucket in buckets)


class RequestRates:
    """How often each of many may ask.

    Args:
        rate: Requests per second.
        burst: Requests in a row.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, TokenBucket] = {}

    def allows(self, who: str, now: float) -> bool:
        """Return whether ``who`` may ask now; counts it if so."""
        bucket = self._buckets.get(who)
        if bucket is None:
            if len(self._buckets) >= MAX_REQUESTERS:
                self._make_room(now)
            bucket = self._buckets[who] = TokenBucket(self._rate, self._burst)
        if bucket.available(now) < 1:
            return False
        bucket.take(1, now)
        return True

    def _make_room(self, now: float) -> None:
        """Forget those who may ask the most: they lose nothing by it."""
        fullest = max(self._buckets, key=lambda who: self._buckets[who].available(now))
        del self._buckets[fullest]
