"""Namespaces of laboratories: can there be any, one command, removal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from fabric.core.errors import FabricError
from sims.lab.enter import NAMESPACES
from sims.lab.plan import Step
from sims.local import start_time_of

TOOLS = ("ip", "tc", "nft", "sysctl")
COMMAND_SECONDS = 30.0


def obstacle() -> str:
    """Return why no network can be built here, or an empty string."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, nftables, procps)"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    return ""


def run_step(step: Step) -> None:
    """Run one command.

    Raises:
        FabricError: it failed; the reason holds what it said.
    """
    done = subprocess.run(
        step.argv,
        input=step.stdin.encode(),
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise FabricError(f"{' '.join(step.argv[:6])}: {said[:1000]}", code="E_LAB")


def sweep() -> None:
    """Remove the networks of processes that are gone."""
    for path in NAMESPACES.glob("lab.*"):
        _, pid, started, *_ = path.name.split(".")
        if start_time_of(int(pid)) != int(started):
            remove_namespace(path.name)


def remove_namespace(name: str) -> None:
    """End what still runs in a namespace of ours, and remove it."""
    argv = ["ip", "netns", "pids", name]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    # fails only if somebody else was faster
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
