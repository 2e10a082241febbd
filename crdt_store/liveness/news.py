"""Claims on their way: each is passed on a bounded number of times, the newest first.

With both directions of every probe a claim reaches everybody after about log2 N
periods if each peer passes it on a few times log10 N (SWIM, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter

from crdt_store.liveness.messages import MAX_CLAIMS, Claim, Standing
from fabric.core.ids import PeerId

TIMES_PER_TEN = 3
"""Times a claim is passed on, per factor of ten of the mesh's size."""
MAX_QUEUED = 64
"""Claims on their way; the most repeated goes first when there is no room."""


@dataclass(slots=True, eq=False)
class _Item:
    claim: Claim
    times: int = 0


_TIMES = attrgetter("times")


class News:
    """What we still pass on."""

    def __init__(self) -> None:
        self._items: list[_Item] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, claim: Claim) -> None:
        """Pass ``claim`` on; it displaces what it answers or repeats."""
        self._items = [i for i in self._items if not _displaces(claim, i.claim)]
        if len(self._items) >= MAX_QUEUED:
            self._items.remove(max(self._items, key=_TIMES))
        self._items.append(_Item(claim))

    def take(self, num_members: int) -> tuple[Claim, ...]:
        """Return what rides on the next message."""
        if not self._items:
            return ()
        chosen = sorted(self._items, key=_TIMES)[:MAX_CLAIMS]
        for item in chosen:
            item.times += 1
        limit = TIMES_PER_TEN * math.ceil(math.log10(num_members + 1))
        if chosen[-1].times >= limit:  # the most repeated of them
            self._items = [
                item for item in self._items if item.times < limit or item not in chosen
            ]
        return tuple([item.claim for item in chosen])

    def acquit(self, subject: PeerId) -> None:
        """Drop accusations of ``subject``: we know better."""
        self._items = [
            item
            for item in self._items
            if item.claim.subject != subject or not item.claim.standing
        ]

    def forget(self, subject: PeerId) -> None:
        """Drop claims about somebody who is no member any more."""
        self._items = [i for i in self._items if i.claim.subject != subject]


def _displaces(new: Claim, old: Claim) -> bool:
    if new.subject != old.subject:
        return False
    if new.incarnation != old.incarnation:
        return new.incarnation > old.incarnation
    if new.standing is not old.standing:
        return new.standing is Standing.DEAD
    return new.accuser == old.accuser
