"""What share of our calls goes unanswered although the peer is there.

A call that fails may have met a ghost, which says nothing about the way to others. So
it waits here until its peer is heard again, and then counts as lost; or until the peer
is dead, and then it is forgotten. Calls of a peer that stalls count as lost too: for
whoever waits for its word that is the same.
"""

from __future__ import annotations

from fabric.core.ids import PeerId

REMEMBERED = 16
"""Calls over which the share is taken: with the latest first, older ones fade."""
MAX_COUNTED = 8
"""Unanswered calls that count for one peer: it may have been away for long."""


class Losses:
    """The share of calls lost lately.

    Attributes:
        share: 0 when all are answered, near 1 when none is.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._unanswered: dict[PeerId, int] = {}

    def answered(self) -> None:
        """A call was answered."""
        self.share -= self.share / REMEMBERED

    def unanswered(self, peer: PeerId) -> None:
        """A call of ``peer`` brought no answer; why is not known yet."""
        count = self._unanswered.get(peer, 0)
        self._unanswered[peer] = min(count + 1, MAX_COUNTED)

    def heard(self, peer: PeerId) -> None:
        """``peer`` is there: what it did not answer was lost."""
        for _ in range(self._unanswered.pop(peer, 0)):
            self.share += (1 - self.share) / REMEMBERED

    def forget(self, peer: PeerId) -> None:
        """``peer`` is dead or no member any more."""
        self._unanswered.pop(peer, None)
