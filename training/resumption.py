"""Whether a job can go on from a checkpoint, said before it starts. No torch.

A checkpoint of a training job holds ``model/<name>`` and ``outer/momentum/<name>`` for
each parameter, and in its state ``round``, the round it starts. The moments of the
inner optimisers are not in it: each peer has its own, and every newcomer starts with
none (DiLoCo, arXiv:2311.08105, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from checkpoints.manifest import Manifest
from fabric.core.errors import ConfigError
from fabric.jobs.spec import JobSpec, ModelSpec

MODEL = "model/"
MOMENTUM = "outer/momentum/"
VOCABULARY = 256
"""Byte-level."""

Shape = tuple[int, ...]


def parameter_shapes(model: ModelSpec) -> dict[str, Shape]:
    """Return name -> shape of every parameter of ``model``, a Llama.

    Source: transformers, models/llama/modeling_llama.py.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    keys = hidden // model.num_heads * model.num_kv_heads
    shapes: dict[str, Shape] = {
        "lm_head.weight": (VOCABULARY, hidden),
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(model.num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("post_attention_layernorm", (hidden,)),
                ("self_attn.q_proj", (hidden, hidden)),
                ("self_attn.k_proj", (keys, hidden)),
                ("self_attn.v_proj", (keys, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("mlp.gate_proj", (inner, hidden)),
                ("mlp.up_proj", (inner, hidden)),
                ("mlp.down_proj", (hidden, inner)),
            )
        }
    return shapes


def state_bytes(model: ModelSpec) -> int:
    """Return the bytes of a state of a run: parameters and outer momentum, F32."""
    numel = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    return 2 * 4 * numel


def resume_tensors(model: ModelSpec) -> dict[str, Shape]:
    """Return name -> shape of every tensor that a run takes from a checkpoint."""
    shapes = parameter_shapes(model)
    return {
        prefix + name: shape
        for prefix in (MODEL, MOMENTUM)
        for name, shape in shapes.items()
    }


def resume_round(spec: JobSpec, manifest: Manifest) -> int:
    """Return the round at which a job of ``spec`` goes on from a checkpoint.

    Raises:
        ConfigError: the checkpoint is of another model or of no training job, or the
            job would be over already.
    """
    found = _state_round(spec.model, manifest)
    rounds = spec.train.outer.rounds
    if found >= rounds:
        raise _refusal(
            f"the checkpoint is of round {found}, the job ends at {rounds}",
            f"raise train.outer.rounds above {found}: it counts from the first of all",
        )
    return found


def check_state(model: ModelSpec, manifest: Manifest, round: int) -> None:
    """Pass if a checkpoint holds the state of a run of ``model`` that starts ``round``.

    Raises:
        ConfigError: it is of another round or model, of no training job, or converted.
    """
    if (found := _state_round(model, manifest)) != round:
        raise _refusal(
            f"the checkpoint is of round {found}, wanted was {round}",
            "its head names another checkpoint: wait for the next one of the run",
        )


def _state_round(model: ModelSpec, manifest: Manifest) -> int:
    wanted = resume_tensors(model)
    present = {name: entry.shape for name, entry in manifest.tensors.items()}
    present |= {name: present[to] for name, to in manifest.aliases.items()}
    if not any(name.startswith(MOMENTUM) for name in present):
        raise _refusal(
            "the checkpoint holds no outer momentum: no training job wrote it",
            "resume from a checkpoint of a run: `fabric jobs --json` names them",
        )
    held = {n: s for n, s in present.items() if n.startswith((MODEL, MOMENTUM))}
    if held != wanted:
        raise _refusal(
            f"the checkpoint is of another model: {_difference(held, wanted)}",
            "give the job the [model] of the run that wrote the checkpoint: "
            "`fabric-ckpt inspect --json` shows its spec",
        )
    _check_types(manifest, wanted)
    return _round_of(manifest)


def _check_types(manifest: Manifest, wanted: Iterable[str]) -> None:
    for name in wanted:
        dtype = manifest.tensors[manifest.aliases.get(name, name)].dtype
        if dtype != "F32":
            raise _refusal(
                f"{name} is {dtype}, a run goes on in F32",
                "resume from the checkpoint as the run wrote it: a cast rounds weights "
                "or momentum, and the run would go on as another one",
            )


def _round_of(manifest: Manifest) -> int:
    found = manifest.state.get("round")
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise _refusal(
            "the checkpoint does not say which round it starts",
            "resume from a checkpoint of a run",
        )
    return found


def _difference(held: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    for name in sorted(held.keys() | wanted.keys()):
        has, needs = held.get(name), wanted.get(name)
        if has is None:
            return f"{name} {list(needs or ())} is missing"
        if needs is None:
            return f"{name} {list(has)} is more than the job has"
        if has != needs:
            return f"{name} is {list(has)}, the job's is {list(needs)}"
    return "nothing"


def _refusal(reason: str, next_step: str) -> ConfigError:
    return ConfigError(reason, code="E_RESUME", next_step=next_step)
