"""Periods of liveness, and the bound they give for a ghost to vanish."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

CONFIRMATIONS = 3
"""K of Lifeguard: further accusers that bring a suspicion's timeout to its minimum."""
DETECTION_PERIODS = 5
"""Nobody probes a ghost in so many periods with probability e^-5 < 1 %."""


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

    def ghost_bound_seconds(self, num_members: int) -> float:
        """Return seconds after which a killed peer is dead in every member's view.

        It is probed within DETECTION_PERIODS, suspected at the end of that period, the
        news is everywhere after log2 N + 1 periods of exchange both ways, and whoever
        missed it hears of the death when the first suspicion ends and waits a shortest
        suspicion of its own, and at the end asks itself. Typical is a third of this: a
        broken connection is probed at once, and confirmed by all who had one.
        """
        news = math.log2(max(2, num_members)) + 1
        periods = DETECTION_PERIODS + 2 + 2 * news
        waits = self.suspicion_seconds(num_members, 1)
        return (
            periods * self.period_seconds
            + waits
            + (0 if num_members <= 2 else self.shortest_suspicion(num_members))
        )
