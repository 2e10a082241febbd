"""``fabric demo``: the steps, in order, and what they found."""

from __future__ import annotations

import json as jsonlib
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec

from fabric.app.cli_output import show_json
from fabric.core.errors import FabricError
from fabric.jobs.runner import SOURCES_FACT
from sims.demo.checkpoint_step import check_checkpoint
from sims.demo.mesh_step import PEERS, build_mesh
from sims.demo.process import finish, start_module
from sims.demo.serve_step import serve_and_ask
from sims.demo.summary import LossPoint, Summary, judge, plot, print_summary
from sims.demo.traffic import (
    expected_bytes,
    expected_state_bytes,
    measured_bytes,
    num_parameters,
)
from sims.demo.train_step import TrainOutcome, TrainStep, demo_spec
from sims.demo.view import DemoView
from sims.local import LocalMesh

TITLES = [
    "a mesh of four peers; a stranger is refused",
    "train one model together; lose a peer, gain a peer",
    "checkpoint: verify, export, identical logits",
    "serve on two peers behind an OpenAI-compatible endpoint",
    "a single process with the same tokens, for comparison",
]
REFERENCE_SECONDS = 240.0


def demo(
    *,
    seed: int = 0,
    keep: bool = False,
    directory: Annotated[Path | None, cyclopts.Parameter(name="--dir")] = None,
    json: bool = False,
) -> None:
    """Train, lose a peer, gain a peer, checkpoint, export and serve, on this machine.

    Args:
        seed: Chooses victim, moment, initial weights and data order.
        keep: Leave the mesh running afterwards.
        directory: Where everything goes; default: a new temporary directory.
        json: Print the summary as one JSON object, as the last line.
    """
    root = directory or Path(tempfile.mkdtemp(prefix="fabric-demo-"))
    root.mkdir(parents=True, exist_ok=True)
    mesh = LocalMesh(root)
    # the daemons must not outlive a demo that is told to end
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with DemoView(TITLES) as view:
            summary = run_demo(mesh, view, seed)
        finish_summary(summary, root)
        if keep:
            home = mesh.peer(PEERS[0]).home
            view.say(f"the mesh stays up: export FABRIC_HOME={home}; fabric status")
            view.say(f"end it with: fabric sim down --dir {root}")
    finally:
        if not keep:
            mesh.down()
    if json:
        show_json(summary)
    if summary.failures:
        raise FabricError("; ".join(summary.failures), code="E_DEMO")


def run_demo(
    mesh: LocalMesh, view: DemoView, seed: int, *, victim: str | None = None
) -> Summary:
    """Run all steps on ``mesh`` and return what they found.

    Raises:
        FabricError: a step could not be carried out.
    """
    started = time.monotonic()
    out = mesh.directory
    summary = Summary(seed=seed, files=str(out))
    view.begin(0)
    summary.refused = build_mesh(mesh, view)
    view.finish(0)

    view.begin(1)
    outcome = TrainStep(mesh, view, seed, victim=victim).run()
    _note_training(summary, outcome)
    view.finish(1)

    view.begin(4)
    reference = _start_reference(seed, outcome.tokens, out)
    try:
        view.begin(2)
        client_peer = PEERS[0]
        checked = check_checkpoint(mesh, view, client_peer, summary.content_root, out)
        summary.checkpoint = checked.root
        summary.verified = checked.verified
        summary.logits_equal = checked.logits_equal
        _note_traffic(summary, outcome, checked.export)
        view.finish(2)

        view.begin(3)
        summary.completion = serve_and_ask(
            mesh, view, client_peer, summary.content_root
        )
        wanted = bytes(checked.tokens).decode("utf-8", "replace")
        summary.tokens_equal = summary.completion == wanted
        view.finish(3)
        _note_paths(summary, mesh)
        _note_reference(
            summary, finish(reference, REFERENCE_SECONDS, out / "tools.log")
        )
        view.finish(4)
    finally:
        if reference.poll() is None:
            reference.kill()
            reference.wait()
    summary.seconds = round(time.monotonic() - started, 1)
    summary.failures = judge(summary)
    return summary


def finish_summary(summary: Summary, root: Path) -> None:
    """Write summary.json and the loss curve beside the other files; print the table."""
    (root / "summary.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(summary), indent=2)
    )
    plot(summary, root / "loss.png")
    print_summary(summary)


def _note_training(summary: Summary, outcome: TrainOutcome) -> None:
    row = outcome.row
    if row is None:
        raise FabricError("the job left no result", code="E_DEMO")
    facts = row.facts
    summary.peers = len(row.participants)
    summary.killed, summary.joined = outcome.killed, outcome.joined
    summary.generations = row.generation
    summary.coordinator_changes = len(outcome.coordinators) - 1
    summary.rounds, summary.tokens = row.round, outcome.tokens
    summary.tokens_per_second = outcome.tokens / float(facts["seconds"])
    summary.curve = outcome.curve
    summary.loss_start = outcome.curve[0].loss
    summary.loss_end = outcome.curve[-1].loss
    summary.content_root = str(facts["checkpoint"])
    summary.digests_equal = facts.get("peers_equal") == len(row.participants)


def _note_traffic(summary: Summary, outcome: TrainOutcome, export: Path) -> None:
    assert outcome.row is not None
    summary.bytes_by_link = measured_bytes(outcome.row)
    numel = num_parameters(export / "model.safetensors")
    expected = expected_bytes(outcome, demo_spec(summary.seed), numel)
    moved = sum(summary.bytes_by_link.get(link, 0) for link in expected)
    summary.bytes_expected = sum(expected.values())
    summary.bytes_expected += expected_state_bytes(outcome, numel)
    summary.state_sources = sum(
        int(value)
        for name, value in outcome.row.facts.items()
        if name.startswith(SOURCES_FACT)
    )
    summary.bytes_ratio = moved / max(1, summary.bytes_expected)


def _note_paths(summary: Summary, mesh: LocalMesh) -> None:
    view = mesh.client(PEERS[0]).status()
    summary.paths = {p.name: p.path for p in view.peers if p.connected}


def _start_reference(seed: int, tokens: int, out: Path) -> subprocess.Popen[str]:
    spec = msgspec.json.encode(demo_spec(seed)).decode()
    arguments = ("--spec", spec, "--tokens", str(tokens))
    return start_module("training.worker.reference", arguments, out / "tools.log")


def _note_reference(summary: Summary, lines: list[dict[str, object]]) -> None:
    points = jsonlib.loads(jsonlib.dumps(lines))
    summary.single_curve = [
        LossPoint(int(p["tokens"]), float(p["validation_loss"])) for p in points
    ]
    summary.loss_single = summary.single_curve[-1].loss
    summary.entropy = float(points[0]["unigram_entropy"])
