"""Ranks of torch programs; each prints its result as a JSON line (see launcher.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


class Ranks:
    def __init__(self):
        # the interpreter's own environment, and no threads beside those under test
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        self.launcher = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script, world, *arguments, killed=(), seconds=120):
        case = {
            "script": str(HERE / script),
            "world": world,
            "arguments": arguments,
            "killed": list(killed),
            "seconds": seconds,
        }
        self.launcher.stdin.write(json.dumps(case) + "\n")
        self.launcher.stdin.flush()
        answer = json.loads(self.launcher.stdout.readline())
        assert not answer["failed"], "\n".join(answer["failed"].values())
        return {int(rank): found for rank, found in answer["results"].items()}

    def close(self):
        self.launcher.stdin.close()
        self.launcher.wait(30)
        self.launcher.stdout.close()


@pytest.fixture(scope="session")
def ranks():
    made = Ranks()
    yield made
    made.close()
