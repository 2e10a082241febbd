"""The job spec: what a person submits, signed, shared and immutable.

One TOML file equals one :class:`JobSpec`. Unknown keys are errors. The id of a job is
the BLAKE3 of its encoded spec, so the same spec with the same nonce is the same job.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import hex_digest
from fabric.core.errors import ConfigError
from fabric.core.ids import JobId

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]

MAX_PIECES = 32
"""Pieces of one checkpoint: their roots stand in its head."""
MAX_PEERS = 256
"""Participants that one coordinator serves."""


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


class CheckpointSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What is kept of a training job, where, and for how long."""

    every_rounds: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    """Rounds between two checkpoints; the end of the job is always one. 0: no other."""
    hot_every_rounds: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 1
    """Rounds between two states kept in memory outside the workers; 0: none."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    """Peers that hold each checkpoint."""
    keep: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 3
    """As many of the newest checkpoints stay; 0: all."""
    erasure: Annotated[
        str, msgspec.Meta(pattern=r"^([1-9][0-9]?\+[1-9][0-9]?)?$", max_length=5)
    ] = ""
    """"k+m": k pieces and m more, any k of which restore a checkpoint. Empty: none."""

    @property
    def pieces(self) -> tuple[int, int]:
        """Return (k, m) of :attr:`erasure`; (0, 0) without."""
        data, _, extra = self.erasure.partition("+")
        return int(data or 0), int(extra or 0)


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a peer must know to take part.

    The submitting daemon fills in ``submitter``, ``nonce``, ``resume_round`` and
    ``signature`` (``submission.py``).
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
    checkpoint: CheckpointSpec = CheckpointSpec()
    resume: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """Content root of the checkpoint to go on from; empty: from the seed."""
    resume_round: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    """The round that checkpoint starts; read from it by the submitting daemon."""
    submitter: Annotated[str, msgspec.Meta(max_length=64)] = ""
    nonce: Annotated[str, msgspec.Meta(max_length=64)] = ""
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    """The submitter's, over the encoding without it."""


CODEC: Codec[JobSpec] = Codec(JobSpec, max_bytes=4096)
"""A spec must fit one slot value (4 KiB); larger payloads go by blob root."""


def job_id(spec: JobSpec) -> JobId:
    """Return the id of ``spec``: BLAKE3 of its deterministic encoding."""
    return JobId(hex_digest(CODEC.encode(spec)))


def load_spec(path: Path, overrides: Mapping[str, object] | None = None) -> JobSpec:
    """Return the spec in the TOML file ``path``, with ``overrides`` on top.

    Args:
        path: The file.
        overrides: Dotted key ("train.outer.rounds") to value; a string is taken as
            TOML would read it where the field is not a string.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value has the wrong
            type or range, or the combination is impossible.
    """
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    for key, value in (overrides or {}).items():
        _set(tree, key.split("."), value)
    return spec_of(tree, str(path))


def spec_of(tree: Mapping[str, object], origin: str) -> JobSpec:
    """Return the spec that ``tree`` describes; ``origin`` names it in errors.

    Raises:
        ConfigError: as :func:`load_spec`.
    """
    _check_keys(JobSpec, tree, "")
    try:
        spec = msgspec.convert(tree, JobSpec)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{origin}: {exc}") from exc
    check_spec(spec)
    return spec


def check_spec(spec: JobSpec) -> None:
    """Refuse combinations that cannot work, with the rule.

    Raises:
        ConfigError: the first rule that ``spec`` breaks.
    """
    for broken, rule, next_step in _rules(spec):
        if broken:
            raise ConfigError(rule, next_step=next_step)
    size = len(CODEC.encode(spec))
    if size > CODEC.max_bytes:
        reason = f"the spec takes {size} B > {CODEC.max_bytes} B"
        raise ConfigError(reason, next_step="name large inputs by their blob root")


def _rules(spec: JobSpec) -> Iterator[tuple[bool, str, str]]:
    model, require = spec.model, spec.require
    yield (
        model.hidden_size % model.num_heads != 0,
        f"model.hidden_size {model.hidden_size} is not a multiple of "
        f"model.num_heads {model.num_heads}",
        "change one of the two",
    )
    yield (
        model.num_heads % model.num_kv_heads != 0,
        f"model.num_heads {model.num_heads} is not a multiple of "
        f"model.num_kv_heads {model.num_kv_heads}",
        "change one of the two",
    )
    yield (
        (model.hidden_size // model.num_heads) % 2 != 0,
        "model.hidden_size / model.num_heads is odd: rotary embedding needs pairs",
        "change one of the two",
    )
    yield (
        require.min_peers > require.max_peers,
        f"require.min_peers {require.min_peers} > "
        f"require.max_peers {require.max_peers}",
        "lower require.min_peers",
    )
    yield (
        require.max_peers > MAX_PEERS,
        f"require.max_peers {require.max_peers} > {MAX_PEERS}",
        "split the run, or wait for hierarchical coordinators",
    )
    yield from _checkpoint_rules(spec)
    serve = spec.kind == "serve"
    yield (
        serve and not spec.serve.checkpoint,
        "a serve job needs serve.checkpoint",
        "fabric content ls names the roots you hold",
    )
    yield (
        serve and spec.serve.stages > require.max_peers,
        f"serve.stages {spec.serve.stages} > require.max_peers {require.max_peers}",
        "each stage is a peer: raise require.max_peers",
    )


def _checkpoint_rules(spec: JobSpec) -> Iterator[tuple[bool, str, str]]:
    rounds = spec.train.outer.rounds
    yield (
        bool(spec.resume) and spec.kind != "train",
        f"a {spec.kind} job cannot resume",
        "name the checkpoint as serve.checkpoint",
    )
    yield (
        spec.resume_round >= rounds,
        f"the checkpoint is of round {spec.resume_round}, the job ends at {rounds}",
        "raise train.outer.rounds: it counts from the first round of all",
    )
    data, extra = spec.checkpoint.pieces
    yield (
        data + extra > MAX_PIECES,
        f"checkpoint.erasure {spec.checkpoint.erasure} makes more than {MAX_PIECES} "
        "pieces",
        "choose fewer",
    )


def _set(tree: dict[str, Any], path: list[str], value: object) -> None:
    """Put ``value`` at ``path``; where its field is no string, parse a string."""
    kind: object = JobSpec
    for part in path[:-1]:
        kind = _fields(kind).get(part)
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(path)}: {part} is a value, not a section")
    leaf = _fields(kind).get(path[-1])
    if isinstance(value, str) and _plain(leaf) in (int, float):
        try:
            value = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            reason = f"{'.'.join(path)}: {value!r} is not a number"
            raise ConfigError(reason) from None
    tree[path[-1]] = value


def _fields(kind: object) -> dict[str, object]:
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return {}
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def _plain(kind: object) -> object:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _check_keys(kind: object, tree: Mapping[str, object], path: str) -> None:
    """Refuse the first key that ``kind`` lacks, with the nearest name."""
    fields = _fields(kind)
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            raise ConfigError(
                f"unknown key {path}{key}",
                next_step=f"did you mean {path}{near[0]}?" if near else "",
            )
        if isinstance(value, dict):
            _check_keys(fields[key], value, f"{path}{key}.")
