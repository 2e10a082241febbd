"""Ranks of a torch program, as processes; each prints its result as a JSON line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def start(script, world, *arguments, extra=None):
    """Start ``world`` ranks of ``script``; return their processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # the interpreter's own environment, and no threads beside those under test
    base = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (extra or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def results(processes, seconds, *, killed=()):
    """Return the last JSON line of each rank that was to end by itself."""
    found = {}
    try:
        for rank, process in enumerate(processes):
            if rank in killed:
                continue
            out, err = process.communicate(timeout=seconds)
            assert process.returncode == 0, f"rank {rank}: {out[-2000:]}{err[-4000:]}"
            lines = [line for line in out.splitlines() if line.startswith("{")]
            found[rank] = json.loads(lines[-1])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()
    return found


@pytest.fixture
def ranks():
    return SimpleNamespace(start=start, results=results)
