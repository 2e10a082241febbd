"""The tensors of a Llama model, from its config.json.

Source: transformers, models/llama/modeling_llama.py; state_dict of LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from checkpoints.manifest import Json
from fabric.core.errors import ConfigError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

Extent = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Shape = tuple[int, ...]


class LlamaShape(msgspec.Struct, frozen=True):
    """The fields of a LlamaConfig that fix its tensors; the others are ignored."""

    hidden_size: Extent
    intermediate_size: Extent
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    num_attention_heads: Extent
    vocab_size: Extent
    num_key_value_heads: Extent | None = None
    head_dim: Extent | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


def expected_tensors(config: Mapping[str, Json]) -> dict[str, Shape]:
    """Return name -> shape of every tensor, ``lm_head.weight`` included.

    Raises:
        ConfigError: a field is missing or out of range.
    """
    try:
        shape = msgspec.convert(dict(config), LlamaShape)
    except msgspec.MsgspecError as exc:
        raise ConfigError(
            f"model_config: {exc}",
            code="E_MODEL_CONFIG",
            next_step="save the model's whole config.json in the state",
        ) from exc
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    tensors: dict[str, Shape] = {
        EMBEDDING: (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        HEAD: (vocabulary, hidden),
    }
    for layer in range(shape.num_hidden_layers):
        for name, extent in _layer(shape).items():
            tensors[f"model.layers.{layer}.{name}"] = extent
    return tensors


def _layer(shape: LlamaShape) -> dict[str, Shape]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads
    head_dim = shape.head_dim or hidden // heads
    queries = heads * head_dim
    keys = (shape.num_key_value_heads or heads) * head_dim
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    tensors: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for block, linears, biased in (
        ("self_attn", attention, shape.attention_bias),
        ("mlp", mlp, shape.mlp_bias),
    ):
        for name, weight in linears.items():
            tensors[f"{block}.{name}.weight"] = weight
            if biased:
                tensors[f"{block}.{name}.bias"] = weight[:1]
    return tensors
