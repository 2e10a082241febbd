"""The Llama that is trained: parameter shapes, the forward, and its config.json.

Every operation and its order is that of transformers' Llama, so logits and gradients
are equal bit for bit; a test compares them. Importing transformers instead costs a
worker more time and memory than importing torch.

Legend: B sequences, T tokens, D hidden size, H query heads, K key-value heads,
E head size.
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals (see the legend)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fabric.core.errors import ConfigError
from fabric.jobs.spec import ModelSpec

VOCABULARY = 256
"""Byte-level."""
NORM_EPSILON = 1e-6
ROPE_THETA = 10_000.0


def check_model(spec: ModelSpec) -> None:
    """Refuse a model that cannot be built.

    Raises:
        ConfigError: another source, or sizes that do not divide.
    """
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
    if spec.hidden_size // spec.num_heads % 2:
        raise ConfigError(
            f"heads of {spec.hidden_size // spec.num_heads} values cannot be rotated "
            "by halves",
            code="E_MODEL_SHAPE",
            next_step="choose a hidden_size that gives each head an even number",
        )


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its name in transformers, sorted."""
    D, inner = spec.hidden_size, spec.intermediate_size
    kv = spec.num_kv_heads * (D // spec.num_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (VOCABULARY, D),
    }
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (inner, D),
        "mlp.up_proj": (inner, D),
        "mlp.down_proj": (D, inner),
    }
    for index in range(spec.num_layers):
        for name, shape in of_layer.items():
            shapes[f"model.layers.{index}.{name}.weight"] = shape
    return dict(sorted(shapes.items()))


class Llama:
    """The forward over parameters that are held elsewhere.

    Args:
        spec: Sizes, checked.
        parameters: One leaf tensor for each of ``parameter_shapes``.
    """

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, Tensor]) -> None:
        self._spec = spec
        self._parameters = parameters
        size = spec.hidden_size // spec.num_heads
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        inverse = 1.0 / (ROPE_THETA**exponents)
        angles = torch.arange(spec.context_tokens).float()[:, None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        self._cos_TE, self._sin_TE = angles.cos(), angles.sin()

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return (B, T, vocabulary) logits; T is at most the model's context."""
        x = functional.embedding(
            tokens_BT, self._parameters["model.embed_tokens.weight"]
        )
        for index in range(self._spec.num_layers):
            layer = f"model.layers.{index}."
            x = x + self._attend(layer, self._norm(layer + "input_layernorm", x))
            x = x + self._mlp(layer, self._norm(layer + "post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.norm", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._parameters[name + ".weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + NORM_EPSILON)
        return self._parameters[name + ".weight"] * x

    def _mlp(self, layer: str, x: Tensor) -> Tensor:
        gate = functional.silu(self._linear(layer + "mlp.gate_proj", x))
        up = self._linear(layer + "mlp.up_proj", x)
        return self._linear(layer + "mlp.down_proj", gate * up)

    def _attend(self, layer: str, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        size = D // self._spec.num_heads

        def heads(name: str) -> Tensor:
            values = self._linear(f"{layer}self_attn.{name}_proj", x_BTD)
            return values.view(B, T, -1, size).transpose(1, 2)

        q_BHTE, k_BKTE, v_BKTE = heads("q"), heads("k"), heads("v")
        out_BHTE = functional.scaled_dot_product_attention(
            self._rotate(q_BHTE),
            self._rotate(k_BKTE),
            v_BKTE,
            is_causal=T > 1,
            scale=size**-0.5,
            enable_gqa=self._spec.num_heads != self._spec.num_kv_heads,
        )
        out_BTD = out_BHTE.transpose(1, 2).reshape(B, T, D)
        return self._linear(layer + "self_attn.o_proj", out_BTD)

    def _rotate(self, x: Tensor) -> Tensor:
        """Apply rotary embeddings (RoFormer, arXiv:2104.09864), halves convention."""
        T = x.shape[-2]
        left, right = x.chunk(2, -1)
        return x * self._cos_TE[:T] + torch.cat((-right, left), -1) * self._sin_TE[:T]


def config_json(spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json that makes transformers build this model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.hidden_size // spec.num_heads,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
