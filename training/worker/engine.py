"""The native engine: one model, AdamW, one thread, the same start everywhere.

Parameters are views into one flat fp32 vector in the order of their sorted names, so
the outer loop sees a vector and nothing is copied between the two.

Initial weights come from numpy's PCG64, one stream per tensor name: torch's own normal
generator takes other code paths on other CPUs, and a library's order of initialisation
is not ours to rely on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fabric.core.digest import digest
from fabric.jobs.spec import ModelSpec, TrainSpec
from training.worker import llama
from training.worker.adamw import AdamW

FINAL_RATE = 0.1
"""Share of the learning rate that is left at the end of the cosine decay."""


class NativeEngine:
    """A model and its inner optimiser.

    Attributes:
        flat: (N,) float32: all parameters; the model's tensors are views into it.
        shapes: Name and shape of each parameter, in the order of ``flat``.

    Raises:
        ConfigError: the model is not one that this worker builds.
    """

    def __init__(self, model: ModelSpec, train: TrainSpec) -> None:
        llama.check_model(model)
        self._spec, self._train = model, train
        self.shapes = llama.parameter_shapes(model)
        self.flat = torch.cat(
            [
                initial_values(name, shape, train.seed)
                for name, shape in self.shapes.items()
            ]
        )
        self._gradient = torch.zeros_like(self.flat)
        gradients = self.named_tensors(self._gradient)
        self._parameters = {
            name: view.detach().requires_grad_()
            for name, view in self.named_tensors(self.flat).items()
        }
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name]
        self._model = llama.Llama(model, self._parameters)
        self._optimiser = AdamW(self.flat, self._matrices())

    def config_json(self) -> dict[str, Any]:
        """Return the model's config.json, as transformers reads it."""
        return llama.config_json(self._spec)

    def steer(self, train: TrainSpec) -> None:
        """Take learning rate, weight decay and clipping of ``train`` from now on."""
        self._train = train

    def load(self, flat: torch.Tensor) -> None:
        """Set all parameters; the optimiser's moments stay, as DiLoCo has it."""
        self.flat.copy_(flat)

    def named_tensors(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of ``flat`` by parameter name."""
        tensors, at = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            tensors[name] = flat[at : at + size].view(shape)
            at += size
        return tensors

    def step(self, windows: Sequence[bytes], progress: float) -> float:
        """Take one AdamW step and return the loss, nats per token.

        Args:
            windows: Context + 1 bytes each.
            progress: Share of the run's inner steps that are done, in [0, 1].
        """
        train = self._train
        loss = self._loss(windows)
        self._gradient.zero_()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), train.grad_clip)
        rate = scheduled_rate(train, self._optimiser.age, progress)
        self._optimiser.step(self._gradient, rate, train.weight_decay)
        return float(loss.detach())

    def evaluate(self, windows: Sequence[bytes]) -> float:
        """Return the mean loss, nats per token, in batches as large as in training."""
        size = self._train.batch_size
        with torch.no_grad():
            losses = [
                float(self._loss(windows[at : at + size]))
                * len(windows[at : at + size])
                for at in range(0, len(windows), size)
            ]
        return sum(losses) / len(windows)

    def _matrices(self) -> list[slice]:
        """Return the parts of ``flat`` that weight decay is for: norms are left out."""
        parts, at = [], 0
        for shape in self.shapes.values():
            size = math.prod(shape)
            if len(shape) > 1:
                parts.append(slice(at, at + size))
            at += size
        return parts

    def _loss(self, windows: Sequence[bytes]) -> torch.Tensor:
        joined = bytearray(b"".join(windows))
        tokens = torch.frombuffer(joined, dtype=torch.uint8).long()
        tokens = tokens.view(len(windows), -1)
        logits = self._model.logits(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, llama.VOCABULARY), tokens[:, 1:].reshape(-1)
        )


def scheduled_rate(train: TrainSpec, age: int, progress: float) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine.

    Args:
        train: Names the peak and the warm-up.
        age: Steps that the optimiser took: a newcomer's moments are new, and warm up.
        progress: Share of the run's inner steps that are done, in [0, 1].
    """
    warm = min(1.0, (age + 1) / max(1, train.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.learning_rate * (warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine))


def initial_values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return ones for a norm, else normal(0, 0.02), flat: Llama's own choice."""
    if len(shape) == 1:
        return torch.ones(shape)
    key = int.from_bytes(digest(f"init/{seed}/{name}".encode()), "big")
    stream = np.random.Generator(np.random.PCG64(key))
    values = stream.standard_normal(math.prod(shape), dtype=np.float32)
    return torch.from_numpy(values * np.float32(0.02))
