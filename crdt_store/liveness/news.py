"""Claims on their way: each is passed on a bounded number of times, the newest first.

With both directions of every probe a claim reaches everybody after about log2 N
periods if each peer passes it on a few times log10 N (SWIM, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from crdt_store.liveness.messages import MAX_CLAIMS, Claim, Standing
from fabric.core.ids import PeerId

TIMES_PER_TEN = 3
"""Times a claim is passed on, per factor of ten of the mesh's size."""
MAX_QUEUED = 64
"""Claims on their way; the most repeated goes first when there is no room."""


class News:
    """What we still pass on."""

    def __init__(self) -> None:
        self._times: dict[Claim, int] = {}

    def __len__(self) -> int:
        return len(self._times)

    def add(self, claim: Claim) -> None:
        """Pass ``claim`` on; it displaces what it answers or repeats."""
        self._drop(c for c in self._times if _displaces(claim, c))
        if len(self._times) >= MAX_QUEUED:
            del self._times[max(self._times, key=self._times.__getitem__)]
        self._times[claim] = 0

    def take(self, num_members: int) -> tuple[Claim, ...]:
        """Return what rides on the next message."""
        if not self._times:
            return ()
        chosen = sorted(self._times, key=self._times.__getitem__)[:MAX_CLAIMS]
        limit = TIMES_PER_TEN * math.ceil(math.log10(num_members + 1))
        for claim in chosen:
            self._times[claim] += 1
            if self._times[claim] >= limit:
                del self._times[claim]
        return tuple(chosen)

    def acquit(self, subject: PeerId) -> None:
        """Drop accusations of ``subject``: we know better."""
        self._drop(c for c in self._times if c.subject == subject and c.standing)

    def forget(self, subject: PeerId) -> None:
        """Drop claims about somebody who is no member any more."""
        self._drop(c for c in self._times if c.subject == subject)

    def _drop(self, claims: Iterable[Claim]) -> None:
        for claim in list(claims):
            del self._times[claim]


def _displaces(new: Claim, old: Claim) -> bool:
    if new.subject != old.subject:
        return False
    if new.incarnation != old.incarnation:
        return new.incarnation > old.incarnation
    if new.standing is not old.standing:
        return new.standing is Standing.DEAD
    return new.accuser == old.accuser
