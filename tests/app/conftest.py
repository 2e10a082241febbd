"""Real daemons and the real command line; their homes lie under a short path."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from sims.local import LocalMesh

COMMAND_SECONDS = 120.0


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self):
        """The JSON values on stdout, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def json(self):
        """The only JSON value on stdout."""
        (value,) = self.rows
        return value

    @property
    def refusal(self):
        """The error that --json printed."""
        return self.json["error"]


def fabric(*arguments, timeout=COMMAND_SECONDS, **options):
    """Run the real command and return how it ended."""
    argv = [sys.executable, "-m", "fabric.app.cli", *map(str, arguments)]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
        **options,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session", name="fabric")
def _fabric():
    return fabric


@pytest.fixture(scope="module")
def short_dir():
    """A directory whose path leaves room for a control socket (107 bytes)."""
    root = Path(tempfile.mkdtemp(prefix="fabric-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def mesh(short_dir):
    """A LocalMesh without daemons; whatever tests start is ended."""
    mesh = LocalMesh(short_dir / "mesh")
    try:
        yield mesh
    finally:
        for name in mesh.names:
            mesh.resume(name)
        mesh.down(grace_seconds=8)
