"""Run one area's tests at full counts, seed after seed, until the time is spent.

    python -m tests.soak state --minutes 10

Each step runs one path of the area with one seed and appends a line to
benchmarks/results/soak-AREA.jsonl: commit, seed, path, seconds, passed. A run goes on
after the last line of the same commit; a step that the time cut off is done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACTOR = 20
"""Examples of each property test, as a multiple of its count in `make test`."""
AREAS = {
    "state": [
        "tests/crdt_store",
        "tests/jobs",
        "tests/dht",
        "tests/sims/simulator",
        "tests/integration/test_partition.py",
        "tests/integration/test_invites.py",
        "tests/integration/test_neighbours.py",
    ],
    "net": ["tests/net", "tests/bulk", "tests/attestation"],
    "ckpt": [
        "tests/checkpoints",
        "tests/integration/test_checkpoints.py",
        "tests/integration/test_recovery.py",
    ],
    "train": [
        "tests/training",
        "tests/integration/test_train.py",
        "tests/integration/test_mesh.py",
        "tests/integration/test_examples.py",
    ],
    "nat": ["tests/integration/nat", "tests/sims/lab", "tests/nat"],
}
END_SECONDS = 90
"""What was cut off has this long to end its daemons and networks."""


def commit() -> str:
    def git(*arguments: str) -> str:
        argv = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    at = git("describe", "--always", "--abbrev=12")
    # our own lines change nothing that is tested
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return (at or "unknown") + ("-dirty" if changed else "")


def next_step(rows: list[dict[str, object]], paths: list[str]) -> tuple[int, str]:
    """Return the first seed and path that ``rows``, of one commit, do not hold."""
    seed = max((int(str(row["seed"])) for row in rows), default=1)
    of_seed = [row for row in rows if row["seed"] == seed]
    done = {row.get("path", "all") for row in of_seed}  # lines of old have no path
    left = [path for path in paths if not done & {path, "all"}]
    return (seed, left[0]) if left else (seed + 1, paths[0])


def rows_of(results: Path, at: str) -> list[dict[str, object]]:
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [row for row in rows if row["commit"] == at]


def run_once(path: str, seed: int, limit: float) -> dict[str, object]:
    environ = os.environ | {
        "SOAK_FACTOR": str(FACTOR),
        "FABRIC_TEST_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu"]
    argv += [f"--hypothesis-seed={seed}", path]
    started = time.monotonic()
    step = {"seed": seed, "path": path}
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end(process)
        return {**step, "cut_off": True, "passed": None, "tests": None}
    last = output.strip().splitlines()[-1] if output.strip() else ""
    passed = re.search(r"(\d+) passed", last)
    if process.returncode:
        sys.stdout.write(output[-8000:])
    return {
        **step,
        "cut_off": False,
        "passed": process.returncode == 0,
        "tests": int(passed.group(1)) if passed else 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def end(process: subprocess.Popen[str]) -> None:
    """Interrupt as Ctrl+C does, so that fixtures remove what they made."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("area", choices=sorted(AREAS))
    parser.add_argument("--minutes", type=float, default=120)
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / f"soak-{options.area}.jsonl"
    at = commit()
    deadline = time.monotonic() + options.minutes * 60
    rows = rows_of(results, at)
    complete = 0
    while (left := deadline - time.monotonic()) > 5:
        seed, path = next_step(rows, AREAS[options.area])
        row = {"area": options.area, "commit": at, **run_once(path, seed, left)}
        print(json.dumps(row), flush=True)
        if row["cut_off"]:
            break
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not row["passed"]:
            raise SystemExit(1)
        rows.append(row)
        complete += 1
    seed, path = next_step(rows, AREAS[options.area])
    print(f"soak {options.area}: {complete} steps, next is seed {seed}, {path}")


if __name__ == "__main__":
    main()
