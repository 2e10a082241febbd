"""The table of what observers saw, bounded, and the mapping that follows from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from fabric.core.ids import PeerId
from nat.addresses import endpoint_of
from nat.reachability.observed_mapping import Mapping, Observation, judge

EXPIRE_SECONDS = 1800.0
"""Two scheduled rounds of reachability refresh an observation before it goes."""
MAX_OBSERVATIONS = 128
"""Twice the neighbours of a large mesh; the oldest goes first."""
MAX_PER_OBSERVER = 4
"""Ports of ours about which one peer is believed: control, and some punched ones."""


class _Key(NamedTuple):
    observer: PeerId
    port: int
    version: int


class ObservedAddresses:
    """What observers said about the ports of this peer. Pure: time is passed in."""

    def __init__(self) -> None:
        self._table: dict[_Key, Observation] = {}

    def __len__(self) -> int:
        return len(self._table)

    def add(self, observation: Observation) -> bool:
        """Keep ``observation``; return whether it says something new.

        A later word of the same observer about the same port replaces the earlier; if
        it differs, it is about a later mapping.
        """
        local = endpoint_of(observation.local)
        seen = endpoint_of(observation.observed)
        if local is None or seen is None or local[0].version != seen[0].version:
            return False
        key = _Key(observation.observer, local[1], local[0].version)
        before = self._table.get(key)
        if before is None:
            self._make_room(observation.observer)
        elif before.observed != observation.observed:
            del self._table[key]
        self._table[key] = observation
        return before is None or before.observed != observation.observed

    def _make_room(self, observer: PeerId) -> None:
        own = [key for key in self._table if key.observer == observer]
        if len(own) >= MAX_PER_OBSERVER:
            self._drop_oldest(own)
        elif len(self._table) >= MAX_OBSERVATIONS:
            self._drop_oldest(list(self._table))

    def _drop_oldest(self, keys: list[_Key]) -> None:
        del self._table[min(keys, key=lambda key: self._table[key].at)]

    def expire(self, now: float) -> None:
        """Forget what is older than EXPIRE_SECONDS."""
        for key, each in tuple(self._table.items()):
            if now - each.at > EXPIRE_SECONDS:
                del self._table[key]

    def forget_local(self, ips: Collection[str]) -> None:
        """Forget what was seen of addresses that we no longer have."""
        for key, each in tuple(self._table.items()):
            local = endpoint_of(each.local)
            if local is not None and str(local[0]) in ips:
                del self._table[key]

    def clear(self) -> None:
        """Forget everything: there is another router now."""
        self._table.clear()

    def mapping(
        self, port: int, own_ips: Collection[str], now: float, version: int = 4
    ) -> Mapping:
        """Return what happens to local ``port``, an IP ``version`` at a time."""
        self.expire(now)
        fitting = [
            each
            for key, each in self._table.items()
            if key.port == port and key.version == version
        ]
        return judge(fitting, own_ips)

    def observers(self, port: int) -> frozenset[PeerId]:
        """Return who said something about ``port``."""
        return frozenset(key.observer for key in self._table if key.port == port)
