"""Real ranks: any layout saved by any world loads into any other, bit for bit."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[3]
FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
SEED = int(os.environ.get("FABRIC_TEST_SEED", "0"))
LAYOUTS = ["plain", "fsdp", "tp", "hsdp", "fsdp_tp", "pp", "ep", "flat"]
WORLDS = [1, 2, 3, 4, 6, 8]
LOADS = 3 if FACTOR == 1 else 24

pytestmark = [pytest.mark.slow]


def run_ranks(base, script, limit=900):
    """Run cases in forked ranks; return what they said if all went well."""
    plan = base / "script.json"
    plan.write_text(json.dumps(script))
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), str(base), str(plan)],
        cwd=ROOT,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_any_layout_loads_into_any_other(tmp_path):
    """Each layout is saved by a world or more, and loaded by every world."""
    rng = random.Random(SEED)
    if FACTOR == 1:
        saved = [(world, rng.sample(LAYOUTS, 2)) for world in WORLDS]
        left = [layout for layout in LAYOUTS if not any(layout in s for _, s in saved)]
        saved[3][1].extend(left)
    else:
        saved = [(world, LAYOUTS) for world in WORLDS]
    names = [f"{layout}-{world}" for world, layouts in saved for layout in layouts]
    script = [
        [world, [["save", [layout]] for layout in layouts]] for world, layouts in saved
    ]
    script += [[1, [["whole", [name]] for name in names]]]
    for world in WORLDS:
        loads = [
            ["load", [rng.choice(names), rng.choice(LAYOUTS), rng.random() < 0.3]]
            for _ in range(LOADS)
        ]
        script.append([world, loads])
    run_ranks(tmp_path, script)


def test_ranks_agree_on_plans_errors_and_reads(tmp_path):
    script = [
        [
            3,
            [
                ["cache", []],
                ["errors", []],
                ["once", []],
                ["save", ["fsdp"]],
                ["damage", ["fsdp-3"]],
            ],
        ],
    ]
    run_ranks(tmp_path, script)


def test_programs_resume_in_any_layout_also_through_torchs_own_calls(tmp_path):
    layouts = {1: ["none"], 2: ["fsdp"], 4: ["fsdp_tp", "fsdp"]}
    script = [
        [world, [["program_save", [how]] for how in hows]]
        for world, hows in layouts.items()
    ]
    saved = [
        f"program-{how}-{world}" for world, hows in layouts.items() for how in hows
    ]
    for number, (world, hows) in enumerate(layouts.items()):
        how = hows[0]
        cases = [["program_resume", [source, how]] for source in saved]
        cases += [["dcp", [how]]]
        cases += [["dcp_reads", [source, how]] for source in saved]
        if number:
            before = list(layouts.items())[number - 1]
            cases += [["dcp_reads", [f"dcp-{before[1][0]}-{before[0]}", how]]]
        if world == 2:
            cases += [["dcp_refuses", []]]
        script.append([world, cases])
    run_ranks(tmp_path, script)
