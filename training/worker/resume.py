"""The start state of a run that goes on from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.tensors import read_into
from fabric.core.errors import ConfigError
from training.resumption import MODEL, MOMENTUM
from training.worker.engines.interface import Engine
from training.worker.outer import OuterState


def resumed_state(path: Path, round_number: int, engine: Engine) -> OuterState:
    """Return the state that the checkpoint at ``path`` holds; each byte is verified.

    The submitting daemon compared names, types and shapes (``training.resumption``);
    a checkpoint that does not fit after all is refused by the read.

    Args:
        path: A step's directory; files may have holes where no wanted tensor lies.
        round_number: The round it starts, as the spec says.
        engine: Knows the names and shapes.

    Raises:
        ConfigError: another round, or a tensor is missing or of another type.
        IntegrityError: a touched block is damaged.
    """
    numel = sum(math.prod(shape) for shape in engine.shapes.values())
    theta, momentum = torch.empty(numel), torch.empty(numel)
    with CheckpointReader(path) as reader:
        if reader.state.get("round") != round_number:
            raise ConfigError(
                f"the checkpoint is of round {reader.state.get('round')}, the job "
                f"resumes at {round_number}",
                code="E_RESUME",
                next_step="submit the job again: its checkpoint was exchanged",
            )
        for prefix, flat in ((MODEL, theta), (MOMENTUM, momentum)):
            for name, tensor in engine.named_tensors(flat).items():
                read_into(reader, prefix + name, tensor)
    return OuterState(round_number, theta, momentum)
