"""The standing of every peer this node has challenged: pure, driven by ``now``.

Bounded by the mesh: a peer gets a standing only after its membership held, and one that
is UNKNOWN again is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attestation.ports import Verdict
from attestation.states import UNKNOWN, Event, Standing, State, Tier, advance
from fabric.core.ids import PeerId

_REASONS = {
    Event.CHALLENGED: "challenged, no evidence yet",
    Event.UNREACHABLE: "did not answer the last challenge",
    Event.MISSED: "no fresh evidence for one interval",
    Event.EXPIRED: "last evidence is too old",
    Event.ENROLLED: "enrolled again, no evidence yet",
}


@dataclass
class Standings:
    """Who stands where.

    Attributes:
        interval: Seconds between two pieces of evidence of one peer.
    """

    interval: float = 600.0
    _standings: dict[PeerId, Standing] = field(default_factory=dict)

    def of(self, peer: PeerId, now: float) -> Standing:
        """Return where ``peer`` stands at ``now``, whether or not it was swept."""
        standing = self._standings.get(peer, UNKNOWN)
        event = _due(standing, now)
        return standing if event is None else _moved(standing, event, "")

    def apply(self, peer: PeerId, event: Event, reason: str = "") -> Verdict | None:
        """Apply ``event``; return a verdict to record if it is one worth keeping.

        Raises:
            LocalProtocolError: the event cannot happen now; use :meth:`accept` for
                ``ACCEPTED``.
        """
        before = self._standings.get(peer, UNKNOWN)
        after = _moved(before, event, reason)
        self._keep(peer, after)
        final = (State.QUARANTINED, State.REVOKED)
        if after.state in final and after.state is not before.state:
            return Verdict(peer, after.state, after.tier, after.reason)
        return None

    def accept(
        self, peer: PeerId, tier: Tier, valid_seconds: float, now: float
    ) -> Verdict | None:
        """Trust ``peer`` at ``tier``; return a verdict if this is news.

        Args:
            peer: Whose evidence passed.
            tier: What the evidence is worth.
            valid_seconds: Lifetime of the result; at most two intervals are used.
            now: Monotonic seconds.
        """
        before = self._standings.get(peer, UNKNOWN)
        state = advance(before.state, Event.ACCEPTED)
        if state is State.TRUSTED:
            lifetime = min(valid_seconds, 2 * self.interval)
            fresh = min(lifetime, 1.5 * self.interval)
            standing = Standing(
                state, tier, now + fresh, now + lifetime, f"{tier.label} evidence held"
            )
            self._keep(peer, standing)
            known = before.state in (State.TRUSTED, State.SUSPECT)
            if not known or before.tier is not tier:
                return Verdict(peer, state, tier, standing.reason)
        return None

    def sweep(self, now: float) -> list[PeerId]:
        """Apply what time alone does; return the peers whose state changed."""
        moved = []
        for peer, standing in list(self._standings.items()):
            after = self.of(peer, now)
            if after is not standing:
                self._keep(peer, after)
                moved.append(peer)
        return moved

    def known(self, now: float) -> dict[PeerId, Standing]:
        """Return every standing that is not UNKNOWN."""
        found = {peer: self.of(peer, now) for peer in self._standings}
        return {p: s for p, s in found.items() if s.state is not State.UNKNOWN}

    def _keep(self, peer: PeerId, standing: Standing) -> None:
        if standing.state is State.UNKNOWN:
            self._standings.pop(peer, None)
        else:
            self._standings[peer] = standing


def _due(standing: Standing, now: float) -> Event | None:
    if standing.state in (State.TRUSTED, State.SUSPECT) and now >= standing.until:
        return Event.EXPIRED
    if standing.state is State.TRUSTED and now >= standing.fresh_until:
        return Event.MISSED
    return None


def _moved(standing: Standing, event: Event, reason: str) -> Standing:
    state = advance(standing.state, event)
    if state is standing.state:
        return standing
    return Standing(
        state,
        standing.tier,
        standing.fresh_until,
        standing.until,
        reason or _REASONS.get(event, event.value),
    )
