"""The job spec: what a person submits, signed, shared and immutable.

One TOML file equals one :class:`JobSpec`. Unknown keys are errors. The id of a job is
the BLAKE3 of its encoded spec, so the same spec with the same nonce is the same job.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import hex_digest
from fabric.core.ids import JobId

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer (transformers' LlamaConfig), byte-level vocabulary."""

    source: Text = "builtin:llama-bytes"
    """"builtin:llama-bytes", or "blob:<root>" of a canonical checkpoint."""
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    num_layers: Positive = 5
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    context_tokens: Positive = 128


class DataSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the text comes from. Byte-level: one token is one byte."""

    source: Text = "builtin:python-stdlib"
    """"builtin:python-stdlib" or "blob:<root>" of a shard list."""
    validation_fraction: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.02
    """Share of shards, chosen by content hash, that no peer trains on."""


class OuterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """DiLoCo (arXiv:2311.08105): H inner steps, one averaged Nesterov outer step."""

    inner_steps: Positive = 10
    """H."""
    rounds: Positive = 10
    """Outer steps in all."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.7
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    quantise: Literal["int8", "none"] = "int8"
    block: Positive = 256
    """Values per int8 scale."""


class TrainSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Inner optimisation: AdamW."""

    batch_size: Positive = 8
    """Sequences per inner step and peer."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 2e-3
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 10
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    grad_clip: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] = 0
    """Initial weights and data order."""
    outer: OuterSpec = OuterSpec()


class ServeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pipeline of layer ranges behind an OpenAI-compatible endpoint."""

    checkpoint: Text = ""
    """Blob root of a canonical checkpoint."""
    stages: Positive = 2
    model_name: Text = "fabric"


class RequireSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What the mesh must have before the job starts, and who may take part."""

    min_peers: Positive = 1
    max_peers: Positive = 64
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Free memory per peer."""
    trust: Literal["member", "software"] = "member"


class FaultSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long to wait for others."""

    patience_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    """The one knob: every deadline of the job derives from it and measured times."""


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a peer must know to take part.

    ``submitter`` and ``nonce`` are filled in by the submitting daemon.
    """

    version: Literal[1] = 1
    kind: Literal["train", "serve"] = "train"
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] = "job"
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    serve: ServeSpec = ServeSpec()
    require: RequireSpec = RequireSpec()
    fault: FaultSpec = FaultSpec()
    submitter: Annotated[str, msgspec.Meta(max_length=64)] = ""
    nonce: Annotated[str, msgspec.Meta(max_length=64)] = ""


CODEC: Codec[JobSpec] = Codec(JobSpec, max_bytes=4096)
"""A spec must fit one slot value (4 KiB); larger payloads go by blob root."""


def job_id(spec: JobSpec) -> JobId:
    """Return the id of ``spec``: BLAKE3 of its deterministic encoding."""
    return JobId(hex_digest(CODEC.encode(spec)))
