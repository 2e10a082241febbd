"""Every nesting of up to eight ranks trains as one process with AdamW does."""

import itertools
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
KINDS = ["odd", "llama-tied", "gpt2", "llama"]

pytestmark = [pytest.mark.slow]


def run_ranks(base, script, limit=1800):
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


def grid():
    """Every legal (d_w, d_g, d_o) of every world, and nestings of any sizes."""
    rng = random.Random(SEED)
    for world in range(1, 9):
        triples = itertools.combinations_with_replacement(range(1, world + 1), 3)
        cases = [
            ["oracle", [rng.choice(KINDS), list(degrees), rng.randint(1, 3)]]
            for degrees in triples
        ]
        cases += [
            ["oracle", [rng.choice(KINDS), f"{SEED}-{world}-{number}"]]
            for number in range(world)
        ]
        yield [world, cases]


INT8 = {"gather_w": "int8", "reduce_w": "int8", "reduce_o": "int8", "update": "int8"}
INT4 = {"reduce_g": "int8", "reduce_o": "int4", "update": "int4"}
FEW = [
    [
        3,
        [
            ["oracle", ["llama-tied", [1, 2, 3], 2, {"checkpointing": True}]],
            ["quantised", ["odd", [2, 2, 3], INT8]],
            ["quantised", ["llama-tied", [1, 2, 2], INT4]],
            ["restart", ["llama-tied", [2, 2, 3], [1, 2, 3], True]],
            ["diverged", ["odd", [1, 1, 3]]],
            ["peak", [1 << 18, 24]],
            ["site", [[1, 2, 3], {}]],
        ],
    ],
    [
        4,
        [
            ["oracle", ["odd", "uneven"]],
            ["oracle", ["gpt2", [2, 4, 4], 1, {"reshard": False}]],
            ["quantised", ["odd", [4, 4, 4], {"gather_w": "int8"}, 2]],
            ["bf16", ["gpt2", [2, 2, 4]]],
            ["lost", ["odd", [2, 2, 4]]],
        ],
    ],
]
MORE = [
    [
        4,
        [
            ["quantised", ["odd", [4, 4, 4], {"gather_w": "int8", "reduce_w": "int4"}]],
            ["restart", ["odd", [1, 3, 4], [2, 2, 2], False]],
            ["restart", ["gpt2", "uneven", [1, 4, 4], True]],
            ["diverged", ["odd", [1, 3, 4]]],
            ["bf16", ["llama", [1, 2, 3]]],
        ],
    ]
]


def test_every_nesting_equals_one_process(tmp_path):
    """Losses, norms, weights; and bytes are the closed form; and what goes with it."""
    run_ranks(tmp_path, FEW if FACTOR == 1 else [*FEW, *MORE, *grid()])
