"""The simulator: an hour of a thousand peers, and how idle traffic grows with size.

The line to beat is wall time: 120 s for the virtual hour (DESIGN.md, section 10), so
``ratio`` is our seconds over 120. Notes on standard error carry events/s, core calls,
and a and b of the cost of writes.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.contract import Row, commit, main, note
from sims.measure import SIZES, traffic_exponent, write_cost
from sims.model.scenario import load_scenario
from sims.simulate import Simulation

HOUR_LINE_SECONDS = 120.0
EXPONENT_LINE = 0.1


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per case; each runs once: a run is a function of its seed."""
    started = time.process_time()
    report = Simulation(load_scenario(Path("idle")), 1, "idle").run()
    note(
        f"{report.events:,} events, {report.events_per_second:,.0f}/s; "
        f"core calls {report.core_calls}; {report.bytes_per_peer_second:.0f} B/s per "
        f"peer; converged {report.converged}, lost {report.lost_writes}"
    )
    yield _row(
        "peers_1000_hour_seconds",
        report.wall_seconds,
        "s",
        "the line",
        HOUR_LINE_SECONDS,
        time.process_time() - started,
    )
    started = time.process_time()
    exponent, rates = traffic_exponent()
    for size, rate in zip(SIZES, rates, strict=True):
        note(f"{size:5} idle peers: {rate:8.1f} B/s per peer")
    spent = time.process_time() - started
    yield _row("traffic_exponent", exponent, "", "the line", EXPONENT_LINE, spent)
    started = time.process_time()
    line, _ = write_cost()
    note(f"bytes/s per peer = {line.intercept:.1f} + {line.slope:.1f} x W")
    spent = time.process_time() - started
    yield _row("write_cost_bytes", line.slope, "B/write", "", None, spent)


def _row(
    case: str, value: float, unit: str, rival: str, line: float | None, cpu: float
) -> Row:
    return Row(
        bench="simulator",
        case=case,
        ours=value,
        unit=unit,
        rival=rival,
        rival_value=line,
        ratio=None if line is None else value / line,
        cpu_seconds=cpu,
        rival_cpu_seconds=None,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        load=round(os.getloadavg()[0], 2),
        commit=commit(),
    )


if __name__ == "__main__":
    main("simulator", measure)
