"""What one run found."""

from __future__ import annotations

import msgspec


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One point of the plots.

    Attributes:
        seconds: Virtual time.
        agreeing: Fraction of the peers online that hold the commonest state.
        bytes_per_peer_second: Sent per peer since the last sample.
        staleness_seconds: Age of the oldest write that some peer lacks.
        online: Peers online.
    """

    seconds: float
    agreeing: float
    bytes_per_peer_second: float
    staleness_seconds: float
    online: int


class LookupFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How searches of providers went.

    Attributes:
        searches: For contents that somebody within reach held.
        found_share: Of them, that named a holder within reach.
        hops_p50, hops_max: From the seeker to the furthest peer that answered.
        seconds_p50, seconds_p95: Until the search was over.
    """

    searches: int
    found_share: float
    hops_p50: int
    hops_max: int
    seconds_p50: float
    seconds_p95: float


class PathFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How connected peers reach each other in the end.

    Attributes:
        direct, punched, relayed, without: Pairs by what carries them.
        needlessly_relayed: Of the relayed, those that could be direct.
        relayed_after_p50, relayed_after_max: Seconds until a pair that cannot be direct
            at once had its relay.
        most_circuits: That one relay carried at a time.
    """

    direct: int
    punched: int
    relayed: int
    without: int
    needlessly_relayed: int
    relayed_after_p50: float
    relayed_after_max: float
    most_circuits: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        converged: All peers ended with the same state.
        convergence_seconds: From the end of the faults until all agreed.
        lost_writes: Acknowledged writes that some peer lacks in the end.
        writes: Acknowledged.
        attacks: Sent.
        refused: Entries refused, by reason.
        bytes_by_kind: Sent by all peers, by purpose.
        bytes_per_peer_second: Sent, mean over peers and time.
        busiest_peer_factor: The most that one peer sent, over the mean.
        events: Of the queue.
        core_calls: Calls into production cores by kind.
        signatures_verified: Each once.
        generations: Of the job, each with its own epoch.
        false_deaths: Views in the end that take a living peer for dead.
        lookups: Of providers, if the scenario has any.
        paths: Of connected pairs, if the scenario follows them.
        violations: Broken promises, in words.
        replay: The command that does this run again.
    """

    scenario: str
    seed: int
    nodes: int
    log_hash: str
    converged: bool
    convergence_seconds: float | None
    lost_writes: int
    writes: int
    attacks: int
    refused: dict[str, int]
    bytes_by_kind: dict[str, int]
    bytes_per_peer_second: float
    busiest_peer_factor: float
    spread_seconds_p50: float | None
    spread_seconds_max: float | None
    events: int
    events_per_second: float
    core_calls: dict[str, int]
    signatures_verified: int
    virtual_seconds: float
    wall_seconds: float
    generations: int
    false_deaths: int
    lookups: LookupFigures | None
    paths: PathFigures | None
    violations: tuple[str, ...]
    replay: str

    @property
    def passed(self) -> bool:
        """Whether nothing that was promised is broken."""
        return not self.violations

    def encoded(self) -> bytes:
        """Return the report as JSON for people."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
