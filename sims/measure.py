"""What the simulator says of cost: how traffic grows with peers and with writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sims.model.scenario import Churn, Network, Scenario, Writes, load_scenario
from sims.report.report import Report
from sims.simulate import Simulation

SIZES = (50, 150, 500, 1500, 5000)
RATES = (0.5, 1.0, 2.0, 4.0)
_WARM_UP_SECONDS = 60.0
"""Everybody reconciles with all its connections at first; then the mesh is idle."""
_IDLE_SECONDS = 240.0
"""Beyond the period of reconciliation of 5,000 peers, 150 s."""


class Line(msgspec.Struct, frozen=True):
    """A straight line through points: ``intercept + slope * x``."""

    intercept: float
    slope: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Return the least-squares line."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope /= spread
    return Line(mean_y - slope * mean_x, slope)


def idle_rate(peers: int, seconds: float = _IDLE_SECONDS, seed: int = 1) -> float:
    """Return the bytes/s that a peer sends when nobody joins, leaves or writes."""
    scenario = msgspec.structs.replace(
        load_scenario(Path("idle"), peers),
        fault_seconds=_WARM_UP_SECONDS + seconds,
        settle_seconds=0.0,
        sample_seconds=_WARM_UP_SECONDS,
        churn=Churn(),
        writes=Writes(),
        must_converge=False,
    )
    simulation = Simulation(scenario, seed, "idle")
    simulation.run()
    steady = [s for s in simulation.samples if s.seconds > 1.5 * _WARM_UP_SECONDS]
    return sum(sample.bytes_per_peer_second for sample in steady) / len(steady)


def traffic_exponent(
    sizes: Sequence[int] = SIZES, seconds: float = _IDLE_SECONDS
) -> tuple[float, list[float]]:
    """Return e where idle bytes/s per peer grow as peers ** e, and those bytes/s."""
    rates = [idle_rate(size, seconds) for size in sizes]
    logs = [math.log(rate) for rate in rates]
    return fit([math.log(size) for size in sizes], logs).slope, rates


def write_cost(
    rates: Sequence[float] = RATES, peers: int = 50, seconds: float = 120.0
) -> tuple[Line, list[Report]]:
    """Return a and b where a peer sends a + b x W bytes/s at W writes/s in all."""
    reports = []
    for rate in rates:
        scenario = Scenario(
            nodes=peers,
            converged_start=True,
            liveness=True,
            fault_seconds=seconds,
            network=Network(regions=("eu", "us-east", "us-west", "asia")),
            writes=Writes(per_second=rate),
        )
        reports.append(Simulation(scenario, 1, "writes").run())
    measured = [report.writes / seconds for report in reports]
    sent = [report.bytes_per_peer_second for report in reports]
    return fit(measured, sent), reports
