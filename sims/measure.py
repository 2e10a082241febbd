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
_IDLE_SECONDS = 300.0


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


def idle_report(peers: int, seconds: float = _IDLE_SECONDS, seed: int = 1) -> Report:
    """Return a run of an idle mesh: no joins, no writes, liveness on."""
    scenario = msgspec.structs.replace(
        load_scenario(Path("idle"), peers),
        fault_seconds=seconds,
        settle_seconds=1.0,
        churn=Churn(),
        writes=Writes(),
    )
    return Simulation(scenario, seed, "idle").run()


def traffic_exponent(
    sizes: Sequence[int] = SIZES, seconds: float = _IDLE_SECONDS
) -> tuple[float, list[Report]]:
    """Return e where idle bytes per peer grow as peers ** e, and the runs."""
    reports = [idle_report(size, seconds) for size in sizes]
    rates = [math.log(report.bytes_per_peer_second) for report in reports]
    return fit([math.log(size) for size in sizes], rates).slope, reports


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
