"""What the outer loop asks of an engine, whatever is behind it: a process or a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from fabric.jobs.spec import TrainSpec


class Engine(Protocol):
    """A model in training, seen as one flat vector in the order of sorted names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of each parameter, in the order of :attr:`flat`."""

    @property
    def flat(self) -> torch.Tensor:
        """(N,) fp32: all parameters. Read it once: a site collects it each time."""

    def config_json(self) -> dict[str, Any]:
        """Return the model's config.json, as transformers reads it."""

    def steer(self, train: TrainSpec) -> None:
        """Take learning rate, weight decay and clipping of ``train`` from now on."""

    def load(self, flat: torch.Tensor) -> None:
        """Set all parameters; the optimiser's moments stay, as DiLoCo has it."""

    def named_tensors(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of ``flat`` by parameter name."""

    def step(self, windows: Sequence[bytes], progress: float) -> float:
        """Take one inner step and return the loss, nats per token."""

    def evaluate(self, windows: Sequence[bytes]) -> float:
        """Return the mean loss, nats per token."""
