"""Checkpoints of real daemons: written while training goes on, copied, resumed."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from checkpoints.reader import CheckpointReader
from checkpoints.verification import verify_checkpoint
from fabric.core.errors import ConfigError
from fabric.jobs.spec import CheckpointSpec
from sims.local import wait_until
from tests.integration.conftest import linked

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

RUN_SECONDS = 120.0
QUICK = (
    "train.worker_threads=1",
    "replication.period_seconds=0.5",
    "replication.lost_after_seconds=6",
)


def spec_of(tiny, **checkpoint):
    spec = tiny(rounds=6, inner_steps=4, min_peers=2, patience=4.0)
    return msgspec.structs.replace(spec, checkpoint=CheckpointSpec(**checkpoint))


def ckpt(*arguments):
    command = [sys.executable, "-m", "checkpoints.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def copies(mesh, root):
    """Return the peers of ``mesh`` that hold ``root`` whole."""
    return {
        name
        for name in mesh.names
        if any(row.root == root for row in mesh.client(name).content())
        and (mesh.directory / name / "data" / "content" / "data" / root).exists()
    }


def test_checkpoints_are_copied_fetched_and_resumed_by_another_mesh_run(
    mesh, form, tiny_spec, tmp_path
):
    names = ("a", "b", "c")
    form(*names, settings=QUICK)
    spec = spec_of(tiny_spec, every_rounds=2, replicas=2, keep=2)
    job = mesh.client("a").submit(spec)
    row = job.result()
    root = str(row.facts["checkpoint"])
    saved = list(job.events(follow=False))
    steps = {e.facts["round"]: e.facts["root"] for e in saved if e.kind == "checkpoint"}
    assert set(steps) <= {2, 4}
    assert steps

    # two copies of the newest two steps, no more, and the oldest is gone
    wait_until(lambda: len(copies(mesh, root)) == 2, RUN_SECONDS, "two copies")
    stay = sorted(steps)[-1:]
    for step in stay:
        wait_until(lambda at=step: len(copies(mesh, steps[at])) == 2, RUN_SECONDS, "2")
    for step in set(steps) - set(stay):
        wait_until(lambda at=step: not copies(mesh, steps[at]), RUN_SECONDS, "retired")
    holder = min(copies(mesh, root))
    wait_until(lambda: shown(mesh, holder) == {(2, 2)}, RUN_SECONDS, "the counts")

    # any peer fetches it, whole or in part
    outside = next(name for name in names if name not in copies(mesh, root))
    home = Path(mesh.peer(outside).home)
    part, whole = tmp_path / "part", tmp_path / "whole"
    code, out, err = ckpt("fetch", root, part, "--only", "model/*norm*", "--home", home)
    assert code == 0, err
    fetched = json.loads(out)
    assert fetched["needed_bytes"] <= fetched["total_bytes"]
    with CheckpointReader(part, root=fetched["root"]) as reader:
        assert all("norm" in name for name in reader.names())
        parent = reader.manifest.parent
    assert verify_checkpoint(part).ok
    code, out, err = ckpt("fetch", root, whole, "--home", home)
    assert code == 0, err
    assert json.loads(out)["root"] == parent == verify_checkpoint(whole).root

    # everybody is killed; a smaller mesh goes on from the checkpoint
    for name in names:
        mesh.kill(name)
    holders = sorted(copies_on_disk(mesh, names, root))
    mesh.start_all(holders, QUICK)
    client = mesh.client(holders[0])
    wait_until(lambda: linked(mesh, holders), RUN_SECONDS, "links")
    bad = msgspec.structs.replace(
        spec, resume=root, model=msgspec.structs.replace(spec.model, num_layers=3)
    )
    with pytest.raises(ConfigError, match="another model") as refusal:
        client.submit(bad)
    assert refusal.value.next_step
    with pytest.raises(ConfigError, match="the job ends at"):
        client.submit(msgspec.structs.replace(spec, resume=root))
    train = msgspec.structs.replace(
        spec.train, outer=msgspec.structs.replace(spec.train.outer, rounds=8)
    )
    again = client.submit(msgspec.structs.replace(spec, resume=root, train=train))
    resumed = again.result()
    assert resumed.round == resumed.rounds == 8
    assert resumed.facts["resumed_round"] == 6
    assert resumed.facts["resumed_state"] == row.facts["parameter_digest"]
    rounds = [e.facts["round"] for e in again.events(follow=False) if e.kind == "round"]
    assert rounds == [6, 7]


def shown(mesh, name):
    """Return the copies that a peer shows of what it holds."""
    return {(row.copies, row.wanted) for row in mesh.client(name).content()}


def copies_on_disk(mesh, names, root):
    return [
        name
        for name in names
        if (mesh.directory / name / "data" / "content" / "data" / root).exists()
    ]
