"""``fabric sim run``: one run of the deterministic simulator."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from fabric.app.cli_output import show_json, show_table, talk
from sims.model.scenario import load_scenario
from sims.report.plots import write_plots
from sims.report.report import Report
from sims.simulate import Simulation


def run(
    scenario: Path,
    *,
    seed: int = 1,
    nodes: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Simulate a mesh in virtual time; the same seed gives the same events.

    Drives the production cores of the store over a modelled network. Exit status 1 when
    peers disagree in the end or an acknowledged write is lost; the command that replays
    the run is printed then.

    Args:
        scenario: TOML file, or the name of one that comes with this program:
            convergence, partition, idle, writes, seven, coordinator, lookup, paths.
        seed: Of everything random.
        nodes: Number of peers, instead of the scenario's.
        out: Folder for events.log, report.json and plots (PNG).
        json: Print one JSON object.
    """
    terms = load_scenario(scenario, nodes)
    with ExitStack() as stack:
        log = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context((out / "events.log").open("wb"))
        simulation = Simulation(terms, seed, str(scenario), log)
        report = simulation.run()
    if out is not None:
        (out / "report.json").write_bytes(report.encoded())
        title = f"{scenario.stem}, {terms.nodes} peers, seed {seed}"
        for file in write_plots(out, simulation.samples, title):
            talk(f"wrote {file}")
    if json:
        show_json(report)
    else:
        show_report(report)
    if not report.passed:
        for violation in report.violations:
            talk(f"seed {seed}: {violation}")
        talk(f"replay: {report.replay}")
        sys.exit(1)


def show_report(report: Report) -> None:
    """Print what a person asks first."""
    agreed = report.convergence_seconds
    kinds = ", ".join(f"{k} {n:,}" for k, n in report.bytes_by_kind.items())
    calls = ", ".join(f"{k} {n:,}" for k, n in report.core_calls.items())
    refused = ", ".join(f"{k} {n}" for k, n in report.refused.items())
    rows: list[tuple[str, object]] = [
        ("peers", report.nodes),
        ("seed", report.seed),
        ("agreed after the faults in", "never" if agreed is None else f"{agreed:g} s"),
        ("acknowledged writes", report.writes),
        ("lost writes", report.lost_writes),
        ("attacks; refused entries", f"{report.attacks}; {refused or 'none'}"),
        ("writes reached everybody in", _spread(report)),
        ("sent per peer", f"{report.bytes_per_peer_second:.1f} B/s"),
        ("busiest peer", f"{report.busiest_peer_factor:g} times the mean"),
        ("bytes by purpose", kinds),
        ("events", f"{report.events:,} ({report.events_per_second:,.0f}/s)"),
        ("core calls", calls),
        ("signatures verified", report.signatures_verified),
        ("virtual, wall", f"{report.virtual_seconds:g} s, {report.wall_seconds:.1f} s"),
        ("log hash", report.log_hash),
    ]
    if found := report.lookups:
        share = f"{found.found_share:.1%} of {found.searches}"
        took = f"{found.seconds_p50:g} s (median), {found.seconds_p95:g} s (95 %)"
        hops = f"{found.hops_p50} (median), {found.hops_max} (most)"
        rows.insert(-1, ("providers found", f"{share} in {took}; hops {hops}"))
    if paths := report.paths:
        kinds = f"direct {paths.direct}, punched {paths.punched}, "
        kinds += f"relayed {paths.relayed}, none {paths.without}"
        after = f"{paths.relayed_after_p50:g} s (median)"
        after += f", {paths.relayed_after_max:g} s (most)"
        rows.insert(-1, ("paths of pairs", kinds))
        rows.insert(-1, ("first path, where relayed", after))
        rows.insert(-1, ("most circuits of a relay", paths.most_circuits))
    show_table(("WHAT", "FOUND"), rows)


def _spread(report: Report) -> str:
    if report.spread_seconds_p50 is None or report.spread_seconds_max is None:
        return "-"
    p50, most = report.spread_seconds_p50, report.spread_seconds_max
    return f"{p50:.2f} s (median), {most:.2f} s (most); to the sample"
