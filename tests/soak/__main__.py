"""Run one area's tests at full counts, seed after seed, until the time is spent.

    python -m tests.soak state --minutes 10

Each pass takes the next seed and appends a line to benchmarks/results/soak-AREA.jsonl:
commit, seed, seconds, passed. A run goes on after the last seed of the same commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACTOR = 20
"""Examples of each property test, as a multiple of its count in `make test`."""
AREAS = {
    "state": ["tests/crdt_store", "tests/jobs", "tests/dht", "tests/sims/simulator"],
    "net": ["tests/net", "tests/bulk", "tests/attestation"],
    "ckpt": ["tests/checkpoints"],
    "train": [
        "tests/training",
        "tests/integration/test_train.py",
        "tests/integration/test_mesh.py",
        "tests/integration/test_examples.py",
    ],
    "nat": ["tests/nat", "tests/sims/lab", "tests/integration/nat"],
}


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def next_seed(results: Path, at: str) -> int:
    if not results.exists():
        return 1
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return max((row["seed"] for row in rows if row["commit"] == at), default=0) + 1


def run_once(area: str, seed: int, limit: float) -> dict[str, object]:
    environ = os.environ | {
        "SOAK_FACTOR": str(FACTOR),
        "FABRIC_TEST_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu"]
    argv += [f"--hypothesis-seed={seed}", *AREAS[area]]
    started = time.monotonic()
    try:
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"seed": seed, "cut_off": True, "passed": None, "tests": None}
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    passed = re.search(r"(\d+) passed", last)
    if done.returncode:
        sys.stdout.write(done.stdout[-8000:])
    return {
        "seed": seed,
        "cut_off": False,
        "passed": done.returncode == 0,
        "tests": int(passed.group(1)) if passed else 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("area", choices=sorted(AREAS))
    parser.add_argument("--minutes", type=float, default=120)
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / f"soak-{options.area}.jsonl"
    at = commit()
    deadline = time.monotonic() + options.minutes * 60
    seed = next_seed(results, at)
    complete = 0
    while (left := deadline - time.monotonic()) > 5:
        row = {"area": options.area, "commit": at, **run_once(options.area, seed, left)}
        print(json.dumps(row), flush=True)
        if row["cut_off"]:
            break
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not row["passed"]:
            raise SystemExit(1)
        complete += 1
        seed += 1
    print(f"soak {options.area}: {complete} passes, next seed {seed}")


if __name__ == "__main__":
    main()
