"""The native engine: one model, AdamW, one thread, the same start everywhere.

Parameters are views into one flat fp32 vector in the order of their sorted names, so
the outer loop sees a vector and nothing is copied between the two.

Initial weights come from numpy's PCG64, one stream per tensor name: torch's own normal
generator takes other code paths on other CPUs, and a library's order of initialisation
is not ours to rely on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fabric.core.digest import digest
from fabric.core.errors import ConfigError
from fabric.jobs.spec import ModelSpec, TrainSpec

VOCABULARY = 256
"""Byte-level."""
FINAL_RATE = 0.1
"""Share of the learning rate that is left at the end of the cosine decay."""
BETAS = (0.9, 0.95)
"""AdamW moments; 0.95 as in GPT-3 (arXiv:2005.14165): short runs, short memory."""


def llama_config(spec: ModelSpec) -> LlamaConfig:
    """Return the transformers configuration of ``spec``."""
    if spec.source != "builtin:llama-bytes":
        raise ConfigError(
            f"model source {spec.source!r} is not one this worker builds",
            code="E_MODEL_SOURCE",
            next_step='use "builtin:llama-bytes"',
        )
    if spec.hidden_size % spec.num_heads or spec.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"{spec.hidden_size} / {spec.num_heads} heads / {spec.num_kv_heads} kv "
            "heads do not divide",
            code="E_MODEL_SHAPE",
        )
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.context_tokens,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


class NativeEngine:
    """A model and its inner optimiser.

    Attributes:
        flat: (N,) float32: all parameters; the model's tensors are views into it.
        shapes: Name and shape of each parameter, in the order of ``flat``.
    """

    def __init__(self, model: ModelSpec, train: TrainSpec) -> None:
        self._train = train
        self.config = llama_config(model)
        self._model = LlamaForCausalLM(self.config).float()
        named = sorted(self._model.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in named}
        self.flat = torch.cat(
            [_initial(name, tuple(p.shape), train.seed) for name, p in named]
        )
        at = 0
        for _, parameter in named:
            size = parameter.numel()
            parameter.data = self.flat[at : at + size].view(parameter.shape)
            at += size
        matrices = [p for _, p in named if p.dim() > 1]
        vectors = [p for _, p in named if p.dim() == 1]
        self._optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": train.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=train.learning_rate,
            betas=BETAS,
        )
        self._age = 0

    def config_json(self) -> dict[str, Any]:
        """Return the model's config.json, as transformers writes it."""
        config = dict(json.loads(self.config.to_json_string(use_diff=False)))
        config["architectures"] = ["LlamaForCausalLM"]
        return config

    def steer(self, train: TrainSpec) -> None:
        """Take learning rate, weight decay and clipping of ``train`` from now on."""
        self._train = train
        self._optimiser.param_groups[0]["weight_decay"] = train.weight_decay

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
        for group in self._optimiser.param_groups:
            group["lr"] = self._train.learning_rate * self._rate(progress)
        loss = self._loss(windows)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._train.grad_clip)
        self._optimiser.step()
        self._age += 1
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

    def _rate(self, progress: float) -> float:
        # Warm-up counts the optimiser's own steps: a newcomer's moments are new too.
        warm = min(1.0, (self._age + 1) / max(1, self._train.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def _loss(self, windows: Sequence[bytes]) -> torch.Tensor:
        joined = bytearray(b"".join(windows))
        tokens = torch.frombuffer(joined, dtype=torch.uint8).long()
        tokens = tokens.view(len(windows), -1)
        logits = self._model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)
        )


def _initial(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return ones for a norm, else normal(0, 0.02), flat: Llama's own choice."""
    if len(shape) == 1:
        return torch.ones(shape)
    key = int.from_bytes(digest(f"init/{seed}/{name}".encode()), "big")
    stream = np.random.Generator(np.random.PCG64(key))
    values = stream.standard_normal(math.prod(shape), dtype=np.float32)
    return torch.from_numpy(values * np.float32(0.02))
