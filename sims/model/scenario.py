"""Scenarios: what a run models, read from TOML and validated at once.

Fractions and rates of faults hold from the start until ``fault_seconds``; then
everything heals and the run goes on until the peers agree, at most ``settle_seconds``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from crdt_store.config import StoreConfig
from fabric.app.config_loader import load_config
from fabric.core.errors import ConfigError

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=7 * 86400)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=100_000)]

MAX_NODES = 10_000
BUILT_IN = Path(__file__).parents[1] / "scenarios"


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The links.

    Attributes:
        regions: Where peers are, dealt out in turn (see regions.py); "lan" is one room.
        jitter: Latency varies by up to this fraction.
        uplink_mbit: Of each peer; 0 is unlimited.
        drop, duplicate, reorder: Fractions of gossip messages.
        reorder_seconds: How late a reordered message may come.
        cut_sessions: Fraction of reconciliations that break in the middle.
        nat: Kinds of NAT (``fabric sim lab`` lists them), dealt out in turn.
    """

    regions: tuple[str, ...] = ("lan",)
    jitter: Fraction = 0.2
    uplink_mbit: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 0.0
    drop: Fraction = 0.0
    duplicate: Fraction = 0.0
    reorder: Fraction = 0.0
    reorder_seconds: Seconds = 2.0
    cut_sessions: Fraction = 0.0
    nat: tuple[str, ...] = ("none",)


class Partitions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cuts between groups of peers.

    Attributes:
        every_seconds: A new random split this often; 0: none.
        groups: At most so many sides.
        at_seconds: Or one split at this time, ...
        for_seconds: ... that heals after this long; 0: none.
    """

    every_seconds: Seconds = 0.0
    groups: Annotated[int, msgspec.Meta(ge=2, le=16)] = 3
    at_seconds: Seconds = 0.0
    for_seconds: Seconds = 0.0


class Churn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peers that come and go.

    Attributes:
        every_seconds: One join or leave this often, in turn; 0: none.
        restart_rate: Crashes per peer and hour; back from disk after ``down_seconds``.
        session: How long a peer stays: all equally likely to leave, or by Weibull
            (shape 0.5: many leave soon, some stay for ever, as measured in open
            peer-to-peer networks) with ``session_seconds`` as its mean.
    """

    every_seconds: Seconds = 0.0
    restart_rate: Rate = 0.0
    down_seconds: Seconds = 10.0
    session: Literal["uniform", "weibull"] = "uniform"
    session_seconds: Seconds = 0.0


class Clocks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Clocks that are wrong: each by up to ``skew_seconds``; some jump."""

    skew_seconds: Seconds = 0.0
    jumps: Count = 0
    jump_seconds: Seconds = 20.0


class Writes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Slots that members write.

    Attributes:
        per_second: Of the whole mesh.
        total: Writes in all, spread over the fault phase; 0: by rate.
        slots: Keys per author.
        bytes: Size of a value.
        refresh: Members rewrite their record as the daemon does.
    """

    per_second: Rate = 0.0
    total: Count = 0
    slots: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 4
    bytes: Annotated[int, msgspec.Meta(ge=1, le=4000)] = 60
    refresh: bool = False


class Trust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Authority under attack.

    Attributes:
        attack_share: Attacks per write.
        late_grants: Fraction of members admitted only during the run.
        revocations: Members revoked during the run.
    """

    attack_share: Fraction = 0.0
    late_grants: Fraction = 0.0
    revocations: Count = 0


class Coordinator(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """A serving job whose leaders die; 0 participants: no job.

    Attributes:
        participants: The first so many peers.
        kill_leaders: How often whoever leads is killed in the fault phase.
    """

    participants: Annotated[int, msgspec.Meta(ge=0, le=50)] = 0
    kill_leaders: Count = 0


class Lookups(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Provider records: who holds what (Kademlia).

    Attributes:
        roots: Contents announced; 0: none.
        holders: Peers that hold each.
        per_second: Searches of the mesh, by anybody for anything.
    """

    roots: Count = 0
    holders: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    per_second: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of run.

    Attributes:
        summary: For people.
        nodes: Peers at the start.
        connections: Standing connections per peer, ``mesh.max_neighbours`` of the
            daemon; 0: with everybody.
        converged_start: Everybody starts with the same, complete state.
        fault_seconds: Length of the phase with faults and writes.
        settle_seconds: Longest time to agree afterwards.
        sample_seconds: How often the plots take a point.
        liveness: Whether peers probe each other.
        traversal: Whether relays, circuits and punches are followed.
        must_converge: Whether not to agree is a failure.
        store: Settings of every peer's store.
    """

    summary: str = ""
    nodes: Annotated[int, msgspec.Meta(ge=1, le=MAX_NODES)] = 7
    connections: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    converged_start: bool = False
    fault_seconds: Seconds = 60.0
    settle_seconds: Seconds = 600.0
    sample_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    liveness: bool = False
    traversal: bool = False
    must_converge: bool = True
    network: Network = Network()
    partitions: Partitions = Partitions()
    churn: Churn = Churn()
    clocks: Clocks = Clocks()
    writes: Writes = Writes()
    trust: Trust = Trust()
    coordinator: Coordinator = Coordinator()
    lookups: Lookups = Lookups()
    store: StoreConfig = StoreConfig()


def load_scenario(file: Path, nodes: int = 0) -> Scenario:
    """Return the scenario in ``file``.

    Args:
        file: TOML; the bare name of one of ours also does.
        nodes: Instead of the number of peers it states.

    Raises:
        ConfigError: no such file, an unknown key (the nearest is named) or bad value.
    """
    if not file.exists():
        ours = BUILT_IN / file.with_suffix(".toml").name
        if not ours.exists():
            known = ", ".join(sorted(f.stem for f in BUILT_IN.glob("*.toml")))
            raise ConfigError(
                f"no scenario file {file}", next_step=f"scenarios of ours: {known}"
            )
        file = ours
    return load_config(Scenario, file, {}, {"nodes": nodes} if nodes else {})
