"""The numbers of a job, for people: merged from rounds and from each peer's facts."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.core.ids import PeerId, short
from fabric.jobs.event_log import names_of
from fabric.jobs.messages import MAX_FACTS, RoundDecision, StateHeld
from fabric.jobs.rounds import Closed
from fabric.jobs.runner import (
    HOT_FACT,
    LINK_FACT,
    RESUMED_ROUND_FACT,
    RESUMED_STATE_FACT,
    SOURCES_FACT,
)

Fact = str | int | float | bool

MAX_STATUS_FACTS_BYTES = 3000
"""Share of a 4 KiB slot value that facts may take; links are dropped first."""


class Ledger:
    """Facts of one job as one peer knows them."""

    def __init__(self) -> None:
        self.tokens = 0
        self._started: float | None = None
        self._totals: dict[str, Fact] = {}
        self._links: dict[str, int] = {}
        self._validation_round = -1

    def start(self, now: float) -> None:
        """The job runs from ``now`` on, unless it did before."""
        if self._started is None:
            self._started = now

    def decided(self, decision: RoundDecision) -> None:
        """Count the tokens of a decided round."""
        self.tokens = decision.tokens_before + sum(decision.tokens)
        self._totals["tokens"] = self.tokens

    def closed(self, closed: Closed) -> dict[str, Fact]:
        """Note a round we decided and return its facts."""
        tokens = sum(closed.decision.tokens)
        facts: dict[str, Fact] = {
            "round": closed.decision.round,
            "contributors": len(closed.decision.contributors),
            "peers": names_of(closed.decision.contributors),
            "tokens": tokens,
            "loss": closed.loss,
            "seconds": closed.seconds,
            "tokens_per_second": tokens / closed.seconds if closed.seconds else 0.0,
        }
        self._totals["loss"] = closed.loss
        self._totals.setdefault("loss_start", closed.loss)
        self._totals["tokens_per_second"] = facts["tokens_per_second"]
        return facts

    def held(self, held: StateHeld) -> bool:
        """Note a validation loss; True when it is the first of its round."""
        if held.validation_loss is None or held.round <= self._validation_round:
            return False
        self._validation_round = held.round
        self._totals["validation_loss"] = held.validation_loss
        self._totals.setdefault("validation_loss_start", held.validation_loss)
        return True

    def peer_facts(self, peer: PeerId, facts: Mapping[str, Fact]) -> None:
        """Merge what ``peer`` sent over each of its links: totals only grow."""
        for name in (RESUMED_ROUND_FACT, RESUMED_STATE_FACT):
            if name in facts:
                self._totals[name] = facts[name]
        if isinstance(hot := facts.get(HOT_FACT), int):
            known = self._totals.get(HOT_FACT)
            self._totals[HOT_FACT] = max(hot, known if isinstance(known, int) else 0)
        if SOURCES_FACT in facts:
            self._totals[f"{SOURCES_FACT}:{short(peer)}"] = facts[SOURCES_FACT]
        for name, value in facts.items():
            if not name.startswith(LINK_FACT) or not isinstance(value, int):
                continue
            link = f"{LINK_FACT}{short(peer)}>{short(name.removeprefix(LINK_FACT))}"
            if link in self._links or len(self._links) < MAX_FACTS // 2:
                self._links[link] = max(value, self._links.get(link, 0))

    def put(self, name: str, value: Fact) -> None:
        """Set one fact."""
        self._totals[name] = value

    def totals(self) -> dict[str, Fact]:
        """Return what a successor should know: everything but links."""
        return dict(self._totals)

    def adopt(self, totals: Mapping[str, Fact]) -> None:
        """Take over the coordinator's totals."""
        self._totals.update(totals)

    def facts(self, now: float) -> dict[str, Fact]:
        """Return everything known."""
        elapsed = now - self._started if self._started is not None else 0.0
        return {"seconds": elapsed, **self._totals, **self._links}

    def slot_facts(self, now: float) -> dict[str, Fact]:
        """Return the facts that fit the status slot."""
        facts = self.facts(now)
        if sum(len(k) + len(str(v)) + 8 for k, v in facts.items()) > (
            MAX_STATUS_FACTS_BYTES
        ):
            facts = {k: v for k, v in facts.items() if k not in self._links}
            facts[f"{LINK_FACT}total"] = sum(self._links.values())
        return facts
