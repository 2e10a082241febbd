"""Periods of liveness, and the bound they give for a ghost to vanish."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

CONFIRMATIONS = 3
"""K of Lifeguard: further accusers that bring a suspicion's timeout to its minimum."""
DETECTION_PERIODS = 5
"""Nobody probes a ghost in so many periods with probability e^-5 < 1 %."""
MIN_ASKED = 3
"""Times a suspect is asked where no call is lost: it may stall just now."""
MAX_ASKED = 12
"""Times a suspect is asked where most calls are lost."""
MISSED = 1e-6
"""How likely all calls of a living suspect may be lost, as far as MAX_ASKED permits."""


class LivenessConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How often members are probed, and how long silence is forgiven.

    The traffic of a peer does not depend on the size of the mesh: it starts one probe
    per period and answers one on average. What grows, with log N, is the time for which
    a suspect may still answer, because news takes that long to go round.
    """

    period_seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0
    """T: one member is probed per period."""
    probe_seconds: Annotated[float, msgspec.Meta(gt=0, le=30)] = 1.5
    """A direct probe is answered within this; the rest of T is for indirect ones."""
    num_relays: Annotated[int, msgspec.Meta(ge=0, le=10)] = 3
    """k: members through which a silent one is probed."""
    suspicion_periods: Annotated[float, msgspec.Meta(gt=0, le=100)] = 4.0
    """Shortest suspicion, in periods per factor of ten of the mesh's size."""
    unconfirmed_factor: Annotated[float, msgspec.Meta(ge=1, le=10)] = 3.0
    """A suspicion that nobody confirms lasts this many times as long."""

    def shortest_suspicion(self, num_members: int) -> float:
        """Return seconds from suspicion to death when others suspect the same."""
        tens = max(1.0, math.log10(max(1, num_members)))
        return self.suspicion_periods * self.period_seconds * tens

    def suspicion_seconds(self, num_members: int, num_accusers: int) -> float:
        """Return seconds from suspicion to death (Lifeguard, section IV-B).

        A single accuser may itself be the one that is cut off or slow, so its word
        counts for less; with too few members for K confirmations it must do.
        """
        low = self.shortest_suspicion(num_members)
        if num_members - 2 < CONFIRMATIONS:
            return low
        high = self.unconfirmed_factor * low
        heard = min(max(num_accusers - 1, 0), CONFIRMATIONS)
        share = math.log(heard + 1) / math.log(CONFIRMATIONS + 1)
        return high - (high - low) * share

    def times_asked(self, num_members: int, lost: float) -> int:
        """Return how often a suspect is asked at least before it is dead.

        If each call is lost with probability f, all n are with f^n: n is chosen to keep
        that below MISSED, but each call has time for an answer within the shortest
        suspicion, so that asking more often does not make a ghost stay longer.

        Args:
            num_members: Members that are there.
            lost: Share of our calls that are lost.
        """
        room = int(self.shortest_suspicion(num_members) / self.probe_seconds) - 1
        wanted = MAX_ASKED
        if lost < 1:
            wanted = math.ceil(math.log(MISSED) / math.log(max(lost, MISSED)))
        return max(1, min(max(wanted, MIN_ASKED), MAX_ASKED, room))

    def ghost_bound_seconds(self, num_members: int) -> float:
        """Return seconds after which a killed peer is dead in every member's view.

        It is probed within DETECTION_PERIODS, suspected at the end of that period, the
        news is everywhere after log2 N + 1 periods of exchange both ways, and whoever
        missed it hears of the death when the first suspicion ends and waits a shortest
        suspicion of its own, within which it asks itself. Typical is a third of this: a
        broken connection is probed at once, and confirmed by all who had one.

        If calls begin to be lost while a suspicion runs, what is still to be asked may
        take up to a shortest suspicion more.
        """
        news = math.log2(max(2, num_members)) + 1
        periods = DETECTION_PERIODS + 2 + 2 * news
        waits = self.suspicion_seconds(num_members, 1)
        return (
            periods * self.period_seconds
            + waits
            + (0 if num_members <= 2 else self.shortest_suspicion(num_members))
        )
