"""Write a round's start state as a canonical checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from checkpoints.directories import step_path
from checkpoints.torch_io.tensors import save_tensors
from fabric.jobs.spec import JobSpec
from training.worker.engines.interface import Engine
from training.worker.outer import OuterState


@dataclass(frozen=True)
class SavedState:
    """A committed checkpoint: its directory, root id, and the bytes of its files."""

    path: str
    root: str
    size_bytes: int


def save_checkpoint(
    directory: Path, spec: JobSpec, engine: Engine, state: OuterState
) -> SavedState:
    """Save parameters and outer momentum as ``directory/step-<round>``.

    Args:
        directory: Holds the steps.
        spec: Recorded, so that a run can be taken up from the checkpoint alone.
        engine: Knows the names and shapes.
        state: What to save.

    Raises:
        ConfigError: the step exists already, or the file system refuses.
        ResourceExhausted: the disk is full; nothing was committed.
    """
    theta = engine.named_tensors(state.theta)
    momentum = engine.named_tensors(state.momentum)
    tensors = {f"model/{name}": tensor for name, tensor in theta.items()}
    tensors |= {f"outer/momentum/{name}": t for name, t in momentum.items()}
    root = save_tensors(
        directory,
        state.round,
        tensors,
        {
            "model_config": engine.config_json(),
            "round": state.round,
            "spec": msgspec.to_builtins(spec),
        },
    )
    path = step_path(directory, state.round)
    size = sum(file.stat().st_size for file in path.iterdir())
    return SavedState(str(path), root, size)
