"""What a plan needs to know of a model: its parameters, and what a token costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec

from fabric.jobs.spec import ModelSpec

VOCABULARY = 256
"""Of the built-in model: one token is one byte."""
_BLOCK = re.compile(r"(.*?\.\d+)\.")


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the cost model sees it.

    Attributes:
        numel: Parameters in all.
        largest_unit: Parameters of the largest unit that is gathered at once.
        units: Units gathered one after the other: blocks, and what is in none.
        hidden_size: Width of the residual stream; 0: not known.
        num_blocks: Transformer blocks; 0: not known.
        num_heads: Attention heads.
        vocabulary: Logits per token.
        context_tokens: Tokens of a sequence.
    """

    numel: int
    largest_unit: int
    units: int
    hidden_size: int = 0
    num_blocks: int = 0
    num_heads: int = 0
    vocabulary: int = 0
    context_tokens: int = 0

    @property
    def flops_per_token(self) -> float:
        """Return the work of one token, forward and backward.

        6 N for the products with weights, 12 L h s for attention: Kaplan et al. 2020,
        arXiv:2001.08361; Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        attention = 12 * self.num_blocks * self.hidden_size * self.context_tokens
        return 6.0 * self.numel + attention

    def activation_bytes(self, tokens: int, value_bytes: int, *, kept: bool) -> int:
        """Return what a backward pass of ``tokens`` needs beside the weights.

        Per block and token 34 h bytes at 2 bytes a value, or, when only the inputs of
        blocks are kept, 2 h and the 34 h of the one block that is computed again.
        Attention is counted without its matrix of scores, as fused kernels have it.
        Source: Korthikanti et al. 2022, arXiv:2205.05198, equations 1 and 2.

        Args:
            tokens: Of one micro-step on one rank.
            value_bytes: Of one activation.
            kept: Whether all activations are kept, none computed again.
        """
        full = 17 * value_bytes * self.hidden_size
        blocks = self.num_blocks
        each = blocks * full if kept else blocks * value_bytes * self.hidden_size + full
        logits = self.vocabulary * (value_bytes + 4)
        return tokens * (each + logits)


def shape_of(
    tensors: Mapping[str, tuple[int, ...]], context_tokens: int = 0, num_heads: int = 0
) -> ModelShape:
    """Return the shape of a model with these parameters.

    Blocks are found by their number in the name ("model.layers.3."); what is in none is
    one unit. Width and vocabulary are those of the largest embedding, if there is one.
    """
    units: dict[str, int] = {}
    for name, shape in tensors.items():
        found = _BLOCK.match(name)
        unit = found.group(1) if found else ""
        units[unit] = units.get(unit, 0) + math.prod(shape)
    num_blocks = len(units) - ("" in units)
    tables = [
        shape
        for name, shape in sorted(tensors.items())
        if "emb" in name and len(shape) == 2 and not _BLOCK.match(name)
    ]
    vocabulary, hidden = max(tables, default=(0, 0))
    return ModelShape(
        numel=sum(units.values()),
        largest_unit=max(units.values(), default=0),
        units=len(units),
        hidden_size=hidden,
        num_blocks=num_blocks,
        num_heads=num_heads,
        vocabulary=vocabulary,
        context_tokens=context_tokens,
    )


def builtin_shape(spec: ModelSpec) -> ModelShape:
    """Return the shape of the built-in byte-level Llama of ``spec``."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    keys = hidden // spec.num_heads * spec.num_kv_heads
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "lm_head.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for number in range(spec.num_layers):
        block = f"model.layers.{number}"
        tensors |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.k_proj.weight": (keys, hidden),
            f"{block}.self_attn.v_proj.weight": (keys, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
        }
    return shape_of(tensors, spec.context_tokens, spec.num_heads)


def uniform_shape(
    numel: int, num_blocks: int, hidden_size: int, context_tokens: int, vocabulary: int
) -> ModelShape:
    """Return the shape of a model known by its size alone: all blocks alike."""
    unit = -(-numel // max(1, num_blocks))
    return ModelShape(
        numel=numel,
        largest_unit=unit,
        units=max(1, num_blocks),
        hidden_size=hidden_size,
        num_blocks=num_blocks,
        vocabulary=vocabulary,
        context_tokens=context_tokens,
    )
