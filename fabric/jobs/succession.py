"""When this peer campaigns for a new generation, and what came of it.

Candidates stand in rendezvous order over the last generation's participants. The first
waits for one patience of silence from the coordinator, each next one half a patience
longer; after a lost campaign a random pause keeps candidates apart.
"""

from __future__ import annotations

import random

from fabric.core.digest import rendezvous_order
from fabric.core.ids import PeerId, short
from fabric.jobs.messages import (
    Ack,
    Generation,
    Inquire,
    JobMessage,
    Nack,
    Propose,
    Standing,
    generation_hash,
)
from fabric.jobs.proposer import BUSY, FOLLOWED, NOBODY, Campaign, Phase, Wish
from fabric.jobs.states import Pause


class Succession:
    """One peer's campaigns for one job, one at a time.

    Args:
        me: This peer.
        patience: Seconds, the spec's one knob.
        rng: Of the pauses between campaigns.
        now: Monotonic seconds.
    """

    def __init__(
        self, me: PeerId, patience: float, rng: random.Random, now: float
    ) -> None:
        self._me, self._patience, self._random = me, patience, rng
        self.campaign: Campaign | None = None
        self.highest_seen = 0
        self.blocked: Pause | None = None
        self.heard = now
        self._retry_at = now

    def entered(self, now: float) -> None:
        """A new generation stands: whatever we attempted is over."""
        self.campaign, self.blocked = None, None
        self.heard = self._retry_at = now

    def due(self, generation: Generation, now: float) -> bool:
        """Whether the coordinator was silent for so long that it is our turn."""
        silence = now - self.heard
        return silence >= self._patience * (1 + self._rank(generation) / 2)

    def _rank(self, generation: Generation) -> int:
        key = (generation.job + generation_hash(generation)).encode()
        others = [p for p in generation.participants if p != generation.coordinator]
        order = rendezvous_order(key, others)
        return order.index(self._me) if self._me in order else 0

    def start(self, base: Generation, wish: Wish, promised: int, now: float) -> None:
        """Begin a campaign, unless one runs or the pause after the last one does."""
        if self.campaign is None and now >= self._retry_at:
            self.campaign = Campaign(
                base,
                self._me,
                wish,
                promised=max(promised, self.highest_seen),
                now=now,
                window=0.6 * self._patience,
            )

    def _asked(self, request: Inquire | Propose) -> Campaign | None:
        """Return the campaign that waits for the answer to ``request``."""
        campaign = self.campaign
        if campaign is None or campaign.over:
            return None
        if isinstance(request, Inquire):
            return campaign if campaign.phase is Phase.INQUIRING else None
        return campaign if campaign.target is request.generation else None

    def replied(
        self,
        peer: PeerId,
        request: Inquire | Propose,
        reply: JobMessage | None,
        now: float,
    ) -> None:
        """``peer`` answered our campaign's ``request``; None says it did not."""
        campaign = self._asked(request)
        if campaign is None:
            return
        match reply:
            case Standing():
                campaign.on_standing(peer, reply, now)
            case Ack():
                campaign.on_ack(peer, reply, now)
            case Nack():
                campaign.on_nack(peer, reply, now)
            case _:
                campaign.on_silence(peer, now)

    def conclude(self, now: float) -> Campaign | None:
        """Return the campaign that just ended, if one did."""
        campaign = self.campaign
        if campaign is None:
            return None
        if now >= campaign.deadline:
            campaign.on_timeout(now)
        if not campaign.over:
            return None
        self.campaign = None
        self.highest_seen = max(self.highest_seen, campaign.highest)
        wait = 0.1 if campaign.reason == BUSY else 0.3 + 0.7 * self._random.random()
        self._retry_at = now + wait * self._patience
        if campaign.reason == FOLLOWED:
            self.blocked = Pause(
                "coordinator_unreachable",
                f"{short(campaign.base.coordinator)} answers others, not us",
                "fabric why PEER shows the path to it",
            )
        elif campaign.missing:
            self.blocked = no_quorum(campaign.missing)
        elif campaign.reason == NOBODY:
            self.blocked = Pause(
                "nobody_takes_part",
                "every participant left, failed or is silent",
                "fabric logs JOB shows why; a peer that asks to join ends this",
            )
        return campaign


def no_quorum(missing: tuple[PeerId, ...]) -> Pause:
    """Return the pause of a minority, naming who is missing."""
    names = ", ".join(short(peer) for peer in missing[:8])
    return Pause(
        "no_quorum",
        f"no majority of the last participants answers; missing: {names}",
        "bring a missing peer back, or stop the job",
    )
