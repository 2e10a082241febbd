"""Read a Llama's shape and single tensors from a checkpoint, as fp32.

Two forms: a canonical checkpoint step (``manifest.json``; tensors ``model/<name>``,
config in the state's ``model_config``), whose every touched block is verified, and a
Hugging Face directory (``config.json``, one or more safetensors files).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import safe_open

from checkpoints.manifest import MANIFEST_NAME
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.tensors import load_tensors
from fabric.core.errors import ConfigError

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class _LlamaConfig(msgspec.Struct, frozen=True):
    """The part of transformers' LlamaConfig that the forward depends on."""

    model_type: str
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    vocab_size: Positive
    rms_norm_eps: float
    max_position_embeddings: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None


class LlamaShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and constants of a model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context: int
    norm_epsilon: float
    rope_theta: float
    tied: bool
    stop_tokens: tuple[int, ...]


class Weights:
    """An open model: its shape, and tensors on demand."""

    def __init__(self, shape: LlamaShape, read: Callable[[str], torch.Tensor]) -> None:
        self.shape = shape
        self._read = read

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of transformers' name ``name``, in memory of its own.

        Raises:
            ConfigError: the model has none of that name.
            IntegrityError: its bytes are not what the manifest says.
        """
        # A copy: mapped tensors are not aligned, and a kernel may assume it.
        return self._read(name).to(torch.float32, copy=True).contiguous()


def open_weights(directory: Path) -> Weights:
    """Open the model in ``directory``.

    Raises:
        ConfigError: neither form, or a model that this stage cannot run exactly.
    """
    if (directory / MANIFEST_NAME).exists():
        return _open_canonical(directory)
    if (directory / "config.json").exists():
        return _open_hugging_face(directory)
    raise ConfigError(
        f"{directory} holds neither manifest.json nor config.json", code="E_NO_MODEL"
    )


def shape_of(config: Mapping[str, Any]) -> LlamaShape:
    """Return the shape of a model from its config.json.

    Raises:
        ConfigError: not a plain Llama.
    """
    try:
        c = msgspec.convert(config, _LlamaConfig)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"model config: {exc}", code="E_MODEL") from exc
    rope = {**(c.rope_scaling or {}), **(c.rope_parameters or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for what, wrong in (
        (f"model_type {c.model_type!r}", c.model_type != "llama"),
        (f"rope_type {kind!r}", kind != "default"),
        (f"hidden_act {c.hidden_act!r}", c.hidden_act != "silu"),
        ("biases", c.attention_bias or c.mlp_bias),
    ):
        if wrong:
            raise ConfigError(
                f"cannot serve a model with {what}",
                code="E_MODEL",
                next_step="plain Llama models are served",
            )
    stops = c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id]
    return LlamaShape(
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads or c.num_attention_heads,
        head_size=c.head_dim or c.hidden_size // c.num_attention_heads,
        vocab_size=c.vocab_size,
        context=c.max_position_embeddings,
        norm_epsilon=c.rms_norm_eps,
        rope_theta=float(c.rope_theta or rope.get("rope_theta") or 10_000.0),
        tied=c.tie_word_embeddings,
        stop_tokens=tuple(token for token in stops if token is not None),
    )


def _open_canonical(directory: Path) -> Weights:
    with CheckpointReader(directory) as reader:
        config = reader.manifest.state.get("model_config")
    if not isinstance(config, dict):
        raise ConfigError(f"{directory} has no model_config", code="E_NO_MODEL")

    def read(name: str) -> torch.Tensor:
        key = f"model/{name}"
        return load_tensors(directory, [key])[key]

    return Weights(shape_of(config), read)


def _open_hugging_face(directory: Path) -> Weights:
    config = json.loads((directory / "config.json").read_text())
    places: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> torch.Tensor:
        if name not in places:
            raise ConfigError(f"no tensor {name!r} in {directory}", code="E_NO_TENSOR")
        with safe_open(places[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    return Weights(shape_of(config), read)
