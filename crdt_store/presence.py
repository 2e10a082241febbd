"""Who is there: the one answer that every view and every table of people uses.

A record outlives its peer: by up to its lifetime when the peer died, and for ever where
a grant does not end. Views hide what an absent peer offered (its record, its
placements); what it found out or made (verdicts, heads, jobs) outlives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from crdt_store.membership import Membership
from fabric.core.ids import PeerId

Word = Literal["here", "left", "nothing"]
Absence = Literal["", "dead", "left", "no member"]
"""Dead is who is unreachable from here, or silent for longer than a record lasts."""


class Presence:
    """Judges peers at the present moment.

    Args:
        membership: Who has a right to be there.
        says: What a peer's own record says of it.
        liveness: "dead" if it is unreachable from here.
    """

    def __init__(
        self,
        membership: Membership,
        says: Callable[[PeerId], Word],
        liveness: Callable[[PeerId], str],
    ) -> None:
        self._membership = membership
        self._says = says
        self._liveness = liveness

    def absence(self, peer: PeerId) -> Absence:
        """Return why ``peer`` is not there, or "" if it is, as far as we know."""
        if not self._membership.membership(peer).allowed:
            return "no member"
        word = self._says(peer)
        if word == "here" and self._liveness(peer) != "dead":
            return ""
        return "left" if word == "left" else "dead"
