"""Run our own programs beside the demo: torch stays out of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fabric.core.errors import FabricError

QUIET_TORCH = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning makes a loaded machine many times slower
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
}


def start_module(
    module: str, arguments: Sequence[str], log: Path
) -> subprocess.Popen[str]:
    """Start ``python -m module``: output to a pipe, errors to ``log``."""
    with log.open("a") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | QUIET_TORCH,
        )


def finish(
    child: subprocess.Popen[str], seconds: float, log: Path
) -> list[dict[str, object]]:
    """Return the JSON objects that ``child`` printed, one per line.

    Raises:
        FabricError: it failed or took longer than ``seconds``; names the log.
    """
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        raise FabricError(f"{child.args!r} took longer than {seconds:g} s") from None
    if child.returncode:
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise FabricError(
            f"{child.args!r} ended with status {child.returncode}: {tail}",
            next_step=f"see {log}",
        )
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def run_module(
    module: str, arguments: Sequence[str], seconds: float, log: Path
) -> list[dict[str, object]]:
    """Run ``python -m module`` to its end (see :func:`finish`)."""
    return finish(start_module(module, arguments, log), seconds, log)
