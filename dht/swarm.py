"""Which block to ask of which peer. Pure: time and randomness come in as arguments.

Rule 1: a missing block is in ``todo`` or in flight at one peer at least; never neither.
Rule 2: the first few blocks are random (a newcomer has nothing others lack), then the
rarest of a sample, so that a block only one peer holds is copied before it leaves.
Rule 3: when nothing is left to ask for first (endgame), an idle peer repeats the
request that waits longest, at most ``max_copies`` times per block.
Rule 4: a peer that is silent for ``timeout`` gives its blocks back and gets no more
until it answers; its late answers count. Two bad blocks ban it.

    next_blocks --> in flight --on_block-------------------> held
                      |  '------on_bad_block, on_missing,
                      |         remove_peer, on_timeout----> todo (unless in flight
                      '---------(other copy arrives)         elsewhere, or held)

Source: Cohen, "Incentives build robustness in BitTorrent" (2003), section 2.4.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from dht import bitmap
from fabric.core.errors import LocalProtocolError
from fabric.core.ids import PeerId

WINDOW = 4
"""Blocks asked of one peer at once: 4 MiB cover 32 ms at 1 Gbit/s."""
RANDOM_FIRST = 4
"""Blocks taken at random before rarity counts."""
MAX_COPIES = 2
"""Peers asked for one block in the endgame."""
MAX_BAD_BLOCKS = 2
"""One may be a broken disk or memory; two are banned."""
_SAMPLE = 64
"""Candidates compared for rarity; exact below that many missing blocks."""


@dataclass
class _Source:
    have: int
    since: float = 0.0
    """When it last answered, or was asked while idle."""
    asked: set[int] = field(default_factory=set)
    stalled: bool = False


class Swarm:
    """One download of ``num_blocks`` blocks.

    Args:
        num_blocks: Blocks of the blob.
        held: Bitmap of those already here.
        skipped: Bitmap of those that nobody wants.
        rng: Source of every random choice.
        window: Blocks in flight per peer.
        timeout: Seconds of silence after which a peer is stalled.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        held: int = 0,
        skipped: int = 0,
        rng: random.Random,
        window: int = WINDOW,
        timeout: float = 30.0,
    ) -> None:
        self.num_blocks = num_blocks
        self._num_skipped = (skipped & ~held).bit_count()
        held |= skipped
        self._held = held
        self._rng = rng
        self._window = window
        self._timeout = timeout
        missing = bitmap.full(num_blocks) & ~held
        self._todo = missing
        self._order = list(bitmap.members(missing))
        self._place = {block: at for at, block in enumerate(self._order)}
        self._flight: dict[int, dict[PeerId, float]] = {}
        self._sources: dict[PeerId, _Source] = {}
        # copies among partial holders; complete ones count for every block alike
        self._copies: Counter[int] = Counter()
        self._bad: Counter[PeerId] = Counter()

    @property
    def done(self) -> bool:
        """Whether every block is here."""
        return self._held == bitmap.full(self.num_blocks)

    @property
    def num_held(self) -> int:
        """Wanted blocks that are here."""
        return self._held.bit_count() - self._num_skipped

    @property
    def num_wanted(self) -> int:
        """Blocks that are wanted."""
        return self.num_blocks - self._num_skipped

    @property
    def peers(self) -> frozenset[PeerId]:
        """The current sources."""
        return frozenset(self._sources)

    def is_banned(self, peer: PeerId) -> bool:
        """Return whether ``peer`` sent too many bad blocks."""
        return self._bad[peer] >= MAX_BAD_BLOCKS

    def add_peer(self, peer: PeerId, have: int) -> None:
        """Use ``peer``, which holds the blocks in ``have``.

        Raises:
            LocalProtocolError: already in use, or banned.
        """
        if peer in self._sources or self.is_banned(peer):
            raise LocalProtocolError(f"{peer} is in use or banned")
        self._sources[peer] = _Source(have)
        self._count(have, 1)

    def update_have(self, peer: PeerId, have: int) -> None:
        """Note that ``peer`` now holds the blocks in ``have``."""
        source = self._source(peer)
        self._count(source.have, -1)
        source.have = have
        self._count(have, 1)

    def remove_peer(self, peer: PeerId) -> None:
        """Take back what ``peer`` was asked for; no-op for a stranger."""
        source = self._sources.pop(peer, None)
        if source is not None:
            self._count(source.have, -1)
            self._take_back(peer, source.asked)

    def next_blocks(self, peer: PeerId, now: float) -> list[int]:
        """Return the blocks to ask of ``peer`` now; they are in flight from here on."""
        source = self._source(peer)
        chosen: list[int] = []
        while not source.stalled and len(source.asked) < self._window:
            block = self._pick(source)
            if block is None:
                block = self._pick_endgame(peer, source)
            if block is None:
                break
            if not source.asked:
                source.since = now
            source.asked.add(block)
            self._drop_todo(block)
            self._flight.setdefault(block, {})[peer] = now
            chosen.append(block)
        return chosen

    def on_block(self, peer: PeerId, block: int, now: float) -> bool:
        """Note a verified block; return whether it was missing."""
        self._answered(peer, block, now)
        new = not self._held >> block & 1
        self._held |= 1 << block
        self._flight.pop(block, None)
        self._drop_todo(block)
        return new

    def on_bad_block(self, peer: PeerId, block: int, now: float) -> bool:
        """Note a block that failed its hash; return whether ``peer`` is banned now."""
        self._answered(peer, block, now)
        self._take_back(peer, (block,))
        self._bad[peer] += 1
        if self.is_banned(peer):
            self.remove_peer(peer)
            return True
        return False

    def on_missing(self, peer: PeerId, block: int, now: float) -> None:
        """Note that ``peer`` does not hold ``block`` after all."""
        source = self._answered(peer, block, now)
        self._take_back(peer, (block,))
        self.update_have(peer, source.have & ~(1 << block))

    def on_timeout(self, now: float) -> list[PeerId]:
        """Take back what silent peers were asked for; return those newly stalled."""
        stalled = [p for p, s in self._sources.items() if self._deadline(s) <= now]
        for peer in stalled:
            source = self._sources[peer]
            source.stalled = True
            self._take_back(peer, source.asked)
        return stalled

    def next_timeout(self) -> float | None:
        """Return when :meth:`on_timeout` should be called, or None."""
        deadline = min(map(self._deadline, self._sources.values()), default=None)
        return None if deadline == float("inf") else deadline

    def check_integrity(self) -> None:
        """Assert rule 1 and that the bookkeeping agrees with itself."""
        flying = sum(1 << block for block in self._flight)
        assert self._todo | flying | self._held == bitmap.full(self.num_blocks)
        assert not self._todo & flying
        assert not self._todo & self._held
        assert not flying & self._held
        assert sorted(self._order) == list(bitmap.members(self._todo))
        assert all(self._order[at] == b for b, at in self._place.items())
        for block, askers in self._flight.items():
            assert 0 < len(askers) <= MAX_COPIES
            assert all(block in self._sources[p].asked for p in askers)
        assert all(len(s.asked) <= self._window for s in self._sources.values())

    def _pick(self, source: _Source) -> int | None:
        """Return a block nobody is asked for that ``source`` holds, or None."""
        if not self._order:
            return None
        count = 1 if self.num_held < RANDOM_FIRST else _SAMPLE
        sample = self._rng.sample(self._order, min(count, len(self._order)))
        # after a silence it may still owe blocks that are to do again
        usable = source.have & ~sum(1 << block for block in source.asked)
        found = [block for block in sample if usable >> block & 1]
        if found:
            return min(found, key=self._copies.__getitem__)
        start = self._rng.randrange(self.num_blocks)
        return bitmap.first_from(self._todo & usable, start)

    def _pick_endgame(self, peer: PeerId, source: _Source) -> int | None:
        """Return the block in flight that waits longest and may be asked once more."""
        if self._order:
            return None
        waiting = [
            (min(askers.values()), block)
            for block, askers in self._flight.items()
            if len(askers) < MAX_COPIES
            and block not in source.asked
            and source.have >> block & 1
        ]
        return min(waiting)[1] if waiting else None

    def _answered(self, peer: PeerId, block: int, now: float) -> _Source:
        source = self._source(peer)
        if block not in source.asked:
            raise LocalProtocolError(f"{peer} was not asked for block {block}")
        source.asked.remove(block)
        source.since, source.stalled = now, False
        return source

    def _take_back(self, peer: PeerId, blocks: Iterable[int]) -> None:
        for block in blocks:
            askers = self._flight.get(block, {})
            if askers.pop(peer, None) is not None and not askers:
                del self._flight[block]
                self._place[block] = len(self._order)
                self._order.append(block)
                self._todo |= 1 << block

    def _drop_todo(self, block: int) -> None:
        at = self._place.pop(block, None)
        if at is not None:
            last = self._order.pop()
            if last != block:  # fill the hole with the last one: O(1)
                self._order[at] = last
                self._place[last] = at
            self._todo &= ~(1 << block)

    def _deadline(self, source: _Source) -> float:
        idle = source.stalled or not source.asked
        return float("inf") if idle else source.since + self._timeout

    def _count(self, have: int, amount: int) -> None:
        if have != bitmap.full(self.num_blocks):
            for block in bitmap.members(have):
                self._copies[block] += amount

    def _source(self, peer: PeerId) -> _Source:
        try:
            return self._sources[peer]
        except KeyError:
            raise LocalProtocolError(f"{peer} is not a source") from None
