"""AdamW (arXiv:1711.05101) over one flat vector, equal to torch.optim's bit for bit.

``torch.optim`` imports torch's compiler with its first step: a second of start-up and
tens of megabytes that a worker does not use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BETAS = (0.9, 0.95)
"""Moments; 0.95 as in GPT-3 (arXiv:2005.14165): short runs, short memory."""
EPSILON = 1e-8


class AdamW:
    """Moments of a flat vector of parameters.

    Args:
        flat: Updated in place by each step.
        decayed: The parts of ``flat`` that weight decay shrinks.
    """

    def __init__(self, flat: torch.Tensor, decayed: Sequence[slice]) -> None:
        self._flat = flat
        self._decayed = [flat[part] for part in decayed]
        self._mean = torch.zeros_like(flat)
        self._square = torch.zeros_like(flat)
        self.age = 0

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, rate: float, decay: float) -> None:
        """Take one step.

        Args:
            gradient: As long as the parameters.
            rate: Learning rate.
            decay: Weight decay, decoupled from the gradient.
        """
        self.age += 1
        for part in self._decayed:
            part.mul_(1 - rate * decay)
        first, second = BETAS
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = rate / (1 - first**self.age)
        scale = (1 - second**self.age) ** 0.5
        spread = (self._square.sqrt() / scale).add_(EPSILON)
        self._flat.addcdiv_(self._mean, spread, value=-size)
