"""Meshes of real daemons for the scenarios; their homes lie under a short path."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from fabric.jobs.spec import (
    FaultSpec,
    JobSpec,
    ModelSpec,
    OuterSpec,
    RequireSpec,
    TrainSpec,
)
from sims.local import LocalMesh, wait_until

SETTINGS = ("train.worker_threads=1",)
CONNECT_SECONDS = 30.0


@pytest.fixture
def seed():
    """One seed per run; set FABRIC_TEST_SEED to choose another."""
    return int(os.environ.get("FABRIC_TEST_SEED", "11"))


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def mesh():
    """A LocalMesh without daemons; whatever a test starts is ended."""
    # a Unix socket path holds 107 bytes, so not under pytest's tmp_path
    root = Path(tempfile.mkdtemp(prefix="fabric-"))
    mesh = LocalMesh(root)
    try:
        yield mesh
    finally:
        for name in mesh.names:
            mesh.resume(name)
        mesh.down(grace_seconds=8)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def form(mesh):
    """Return a function that starts peers, makes them one mesh and returns a token."""

    def form(*names, settings=SETTINGS):
        mesh.start_all(names, settings)
        mesh.create_mesh(names[0], "lab")
        token = mesh.client(names[0]).invite(uses=9)
        for name in names[1:]:
            mesh.client(name).join(token)
        wait_until(lambda: linked(mesh, names), CONNECT_SECONDS, "all links")
        return token

    return form


def linked(mesh, names):
    """Return whether each of ``names`` knows and reaches all others."""
    views = [mesh.client(name).status() for name in names]
    ids = {view.peer for view in views}
    return all(
        {row.peer for row in view.peers if row.connected and row.name}
        >= ids - {view.peer}
        for view in views
    )


@pytest.fixture
def tiny_spec(seed):
    """Return a function that makes the spec of a job of a few seconds."""

    def tiny_spec(
        *, rounds=20, inner_steps=10, min_peers=3, max_peers=64, patience=5.0
    ):
        return JobSpec(
            name="tiny",
            model=ModelSpec(
                hidden_size=64,
                intermediate_size=128,
                num_layers=2,
                context_tokens=64,
            ),
            train=TrainSpec(
                batch_size=2,
                seed=seed,
                outer=OuterSpec(rounds=rounds, inner_steps=inner_steps),
            ),
            require=RequireSpec(min_peers=min_peers, max_peers=max_peers),
            fault=FaultSpec(patience_seconds=patience),
        )

    return tiny_spec
