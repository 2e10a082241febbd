"""The network between the peers: latency, uplinks, paths, and who reaches whom.

A peer is a number here. Messages on connections are reliable and cost time; they are
lost only when one end goes or a partition falls in between, which the sender learns
after its own timeout.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache

from sims.engine.queue import Action, Engine
from sims.model.paths import facts_of, kind_named, path_between
from sims.model.regions import check_region, one_way_seconds
from sims.model.scenario import Network as NetworkTerms

_BITS_PER_BYTE = 8
_RELAY_DETOUR = 2.0
"""A relayed message goes over two links."""


class Network:
    """Links of one run.

    Args:
        engine: Virtual time.
        terms: What the scenario says about links.
        rng: Jitter.

    Attributes:
        online: Whether each peer runs.
        side: The side of the partition each is on.
        sent, received: Bytes of each peer so far.
        by_kind: Bytes sent by all, by what they were for.
        epoch: Grows whenever somebody may reach somebody else than before.
    """

    def __init__(self, engine: Engine, terms: NetworkTerms, rng: random.Random) -> None:
        self.terms = terms
        self.online: list[bool] = []
        self.side: list[int] = []
        self.sent: list[int] = []
        self.received: list[int] = []
        self.by_kind: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.epoch = 0
        self._barred: set[tuple[int, int]] = set()
        self._engine = engine
        self._rng = rng
        self._regions = [check_region(name) for name in terms.regions]
        kinds = [kind_named(name) for name in terms.nat]
        self._kinds = len(kinds)
        self._public = [facts_of(kind).public for kind in kinds]
        self._paths = [[path_between(a, b) for b in kinds] for a in kinds]
        self._latency = lru_cache(maxsize=None)(self._one_way)
        self._free_at: list[float] = []
        rate = terms.uplink_mbit * 1e6 / _BITS_PER_BYTE
        self._seconds_per_byte = 1 / rate if rate else 0.0

    def add(self) -> int:
        """Return the number of a new peer, not online yet."""
        for column in (self.sent, self.received, self.side):
            column.append(0)
        self.online.append(False)
        self._free_at.append(0.0)
        return len(self.online) - 1

    def set_online(self, peer: int, online: bool) -> None:
        """Note that ``peer`` started or ended."""
        self.online[peer] = online
        self.epoch += 1

    def divide(self, sides: list[int]) -> None:
        """Cut the peers apart; all on one side: healed."""
        self.side[:] = sides
        self.epoch += 1

    def linked(self, one: int, other: int) -> bool:
        """Return whether the two can have a connection now."""
        online, side = self.online, self.side
        up = online[one] and online[other] and side[one] == side[other]
        return up and not (self._barred and self.barred(one, other))

    def bar(self, one: int, other: int) -> None:
        """Have the two never be connected again: one refuses the other."""
        self._barred |= {(one, other), (other, one)}
        self.epoch += 1

    def barred(self, one: int, other: int) -> bool:
        """Return whether one of the two refuses the other."""
        return (one, other) in self._barred

    @property
    def bars_anybody(self) -> bool:
        """Whether there are peers that refuse others."""
        return bool(self._barred)

    def path_kind(self, one: int, other: int) -> str:
        """Return how the two are connected: "direct", "punched" or "relay"."""
        return self._paths[one % self._kinds][other % self._kinds]

    def is_public(self, peer: int) -> bool:
        """Return whether anybody can open connections to ``peer``."""
        return self._public[peer % self._kinds]

    def _one_way(self, one: int, other: int) -> float:
        regions = self._regions
        return one_way_seconds(regions[one], regions[other])

    def delay(self, sender: int, receiver: int, size: int) -> float:
        """Return when a message sent now arrives, in seconds from now."""
        now = self._engine.now
        start = now
        if self._seconds_per_byte:
            start = max(now, self._free_at[sender]) + size * self._seconds_per_byte
            self._free_at[sender] = start
        regions = len(self._regions)
        latency = self._latency(sender % regions, receiver % regions)
        if self._kinds > 1 and self.path_kind(sender, receiver) == "relay":
            latency *= _RELAY_DETOUR
        jitter = 1.0 + self.terms.jitter * self._rng.random()
        return start - now + latency * jitter

    def count(self, sender: int, receiver: int, kind: str, size: int) -> None:
        """Note ``size`` bytes on their way."""
        self.sent[sender] += size
        self.received[receiver] += size
        self.by_kind[kind] += size
        self.messages[kind] += 1

    def send(
        self,
        sender: int,
        receiver: int,
        kind: str,
        size: int,
        arrived: Action,
        lost: Action,
        *args: object,
    ) -> None:
        """Send over the connection of the two; exactly one of the actions is called.

        Args:
            sender: Who.
            receiver: To whom.
            kind: What for.
            size: Bytes on the wire.
            arrived: Called when it arrives.
            lost: Called at the time it would have arrived, when it does not.
            *args: Of the action.
        """
        self.count(sender, receiver, kind, size)
        self._engine.after(
            self.delay(sender, receiver, size),
            self._arrive,
            sender,
            receiver,
            arrived,
            lost,
            args,
        )

    def _arrive(
        self,
        sender: int,
        receiver: int,
        arrived: Action,
        lost: Action,
        args: tuple[object, ...],
    ) -> None:
        if self.linked(sender, receiver):
            arrived(*args)
        else:
            lost(*args)
