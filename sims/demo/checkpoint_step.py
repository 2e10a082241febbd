"""Step 4: fetch the checkpoint, verify it, export it, compare the export's logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fabric.core.errors import FabricError
from sims.demo.process import run_module
from sims.demo.view import DemoView
from sims.local import LocalMesh

PROMPT = "import os\n\n\ndef "
NUM_TOKENS = 48
TOOL_SECONDS = 120.0


@dataclass(frozen=True)
class CheckpointOutcome:
    """What the tools said."""

    root: str
    verified: bool
    logits_equal: bool
    tokens: tuple[int, ...]
    """Greedy continuation of PROMPT by transformers.generate on the export."""
    export: Path


def check_checkpoint(
    mesh: LocalMesh, view: DemoView, peer: str, content_root: str, out: Path
) -> CheckpointOutcome:
    """Take the checkpoint from the mesh through ``peer`` and put it to the test.

    Raises:
        FabricError: a tool failed.
    """
    log = out / "tools.log"
    canonical, export = out / "checkpoint", out / "export"
    mesh.client(peer).content_get(content_root, canonical)
    view.say(f"{peer} has checkpoint {content_root[:16]} in {canonical}")
    tool = "checkpoints.cli"
    report = run_module(tool, ("verify", str(canonical), "--json"), TOOL_SECONDS, log)[
        -1
    ]
    view.say(f"fabric-ckpt verify: {report['blocks']} blocks, ok {report['ok']}")
    arguments: tuple[str, ...]
    arguments = (
        "convert",
        str(canonical),
        str(export),
        "--to",
        "huggingface",
        "--json",
    )
    run_module(tool, arguments, TOOL_SECONDS, log)
    view.say(f"fabric-ckpt convert: Hugging Face form in {export}")
    arguments = (str(canonical), str(export), "--prompt", PROMPT)
    facts = run_module(
        "training.worker.compare",
        (*arguments, "--tokens", str(NUM_TOKENS)),
        TOOL_SECONDS,
        log,
    )[-1]
    view.say(f"transformers loads it: logits identical {facts['logits_equal']}")
    tokens = facts["tokens"]
    if not isinstance(tokens, list):
        raise FabricError("the comparison printed no tokens")
    return CheckpointOutcome(
        str(report["root"]),
        bool(report["ok"]),
        bool(facts["logits_equal"]),
        tuple(tokens),
        export,
    )
