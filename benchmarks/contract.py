"""The contract of a benchmark: one JSON object per case, kept as JSON lines.

``python -m benchmarks.NAME --json`` prints the objects; without ``--json``, a table.
Both append them to ``benchmarks/results/NAME.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3
"""Interleaved rounds of which the median counts, at least."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case.

    Attributes:
        ratio: ours / rival_value where more is better, else cost / rival's cost; the
            median of the rounds' ratios, because load differs between rounds.
        cpu_seconds: Of our processes, per call or per GB. On a loaded machine this says
            more than the ratio: a rival with more threads gets more of the processor.
        rival_cpu_seconds: The same of the rival's processes.
        peak_rss_bytes: Of our largest process.
        load: One-minute load average when the case ended.
        skipped: Why there is no rival value, or what else to know; or empty.
    """

    bench: str
    case: str
    ours: float | None
    unit: str
    rival: str
    rival_value: float | None
    ratio: float | None
    cpu_seconds: float | None
    rival_cpu_seconds: float | None
    peak_rss_bytes: int | None
    load: float
    commit: str
    skipped: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one contestant; ``cpu_seconds`` per call or per GB.

    Zero means not measured: a row then says null.
    """

    value: float
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0


def compare(
    bench: str,
    case: str,
    unit: str,
    rival: str,
    ours: Sequence[Sample],
    theirs: Sequence[Sample],
    skipped: str = "",
) -> Row:
    """Return the row of one case from the samples of its interleaved rounds."""
    ratios = [
        a.value / b.value for a, b in zip(ours, theirs, strict=False) if b.value > 0
    ]
    return Row(
        bench=bench,
        case=case,
        ours=_median(s.value for s in ours),
        unit=unit,
        rival=rival,
        rival_value=_median(s.value for s in theirs),
        ratio=_median(ratios),
        cpu_seconds=_median(s.cpu_seconds for s in ours if s.cpu_seconds),
        rival_cpu_seconds=_median(s.cpu_seconds for s in theirs if s.cpu_seconds),
        peak_rss_bytes=max((s.peak_rss_bytes for s in ours), default=0) or None,
        load=round(os.getloadavg()[0], 2),
        commit=commit(),
        skipped=skipped,
    )


def main(bench: str, measure: Callable[[int], Iterable[Row]]) -> None:
    """Run a benchmark as a command.

    Args:
        bench: Its name: the module's, and the result file's.
        measure: Called with the number of rounds; yields rows as they are known.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{bench}")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least 3")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{bench}.jsonl").open("a") as results:
        for row in measure(max(options.rounds, ROUNDS)):
            line = msgspec.json.encode(row).decode()
            results.write(line + "\n")
            print(line if options.json else _table_line(row), flush=True)


def commit() -> str:
    """Return the commit that was measured, with "+" when files differ from it."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short", "HEAD")
        changed = _git(
            here,
            "status",
            "--porcelain",
            "--",
            "fabric",
            "crdt_store",
            "benchmarks/*.py",
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=where.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _table_line(row: Row) -> str:
    parts = [f"{row.case:32} {_number(row.ours)} {row.unit:10}"]
    if row.ratio is not None:
        rival = f"{row.rival:16} {_number(row.rival_value)}"
        parts.append(f"{rival}   {row.ratio:6.3g}x")
    if row.cpu_seconds and row.rival_cpu_seconds:
        parts.append(f"CPU 1/{row.rival_cpu_seconds / row.cpu_seconds:.1f}")
    return "  ".join([*parts, _cost(row), row.skipped]).rstrip()


def _cost(row: Row) -> str:
    """Return CPU per call or GB, and memory, of our processes."""
    parts = []
    if row.cpu_seconds:
        small = row.cpu_seconds < 1e-2
        parts.append(
            f"{row.cpu_seconds * 1e6:.0f} us" if small else f"{row.cpu_seconds:.2f} s"
        )
    if row.peak_rss_bytes:
        parts.append(f"{row.peak_rss_bytes / 2**20:.0f} MiB")
    return ", ".join(parts)


def _number(value: float | None) -> str:
    if value is None:
        return f"{'-':>12}"
    return f"{value:12,.1f}" if value >= 10 else f"{value:12,.3f}"


def note(text: str) -> None:
    """Say ``text`` to the person who waits; data goes to standard output."""
    print(text, file=sys.stderr, flush=True)
