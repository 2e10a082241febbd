"""The native engine's state as a canonical checkpoint: any ranks save, any ranks load.

``model/<name>`` are the fp32 master weights, ``optimizer/exp_avg/<name>`` and
``optimizer/exp_avg_sq/<name>`` the moments, each as the boxes that this rank owns; what
is not trained is saved as it is. Neither the degrees nor the number of ranks need be
the same when it is loaded. What quantising dropped (residuals) is not saved: after a
load, weights are the exact master weights and feedback begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from checkpoints.manifest import Json
from checkpoints.torch_io.exchange import Exchange
from checkpoints.torch_io.loader import Loaded, load_into
from checkpoints.torch_io.pieces import FlatShard, FlatShards, Value
from checkpoints.torch_io.saver import Saver
from fabric.core.errors import IntegrityError
from training.worker.engines.native.engine import ShardedEngine
from training.worker.engines.native.states import owned

MOMENTS = ("optimizer/exp_avg", "optimizer/exp_avg_sq")


def tensors_of(engine: ShardedEngine) -> dict[str, Value]:
    """Return what this rank owns, by canonical name: views."""
    space = engine.space
    found: dict[str, list[FlatShard]] = {}
    for each in owned(engine.states, engine.owned):
        name, shape = space.names[each.piece.tensor], space.shapes[each.piece.tensor]
        views = zip(("model", *MOMENTS), each[1:], strict=True)
        for kind, view in views:
            shard = FlatShard(view, shape, each.piece.begin)
            found.setdefault(f"{kind}/{name}", []).append(shard)
    tensors: dict[str, Value] = {
        name: FlatShards(tuple(shards)) for name, shards in found.items()
    }
    for alias, name in space.aliases.items():
        if f"model/{name}" in tensors:
            tensors[f"model/{alias}"] = tensors[f"model/{name}"]
    return tensors | _not_trained(engine)


def save(
    saver: Saver,
    engine: ShardedEngine,
    step: int,
    state: Mapping[str, Json] | None = None,
) -> None:
    """Save a step in the background; all ranks call.

    Args:
        saver: Of these ranks.
        engine: Its states may change when this returns.
        step: Number of the step.
        state: More to keep, as JSON.

    Raises:
        FabricError: see :meth:`Saver.save`.
    """
    layout = {"nesting": [list(map(list, p)) for p in engine.partition]}
    more = {**(state or {}), "native": {"age": engine.age}}
    saver.save(step, tensors_of(engine), more, layout=layout)


def load(path: Path, engine: ShardedEngine, *, exchange: Exchange) -> Loaded:
    """Take up a step that any ranks saved; all ranks call.

    Raises:
        ConfigError: another model was saved, or there is no checkpoint.
        IntegrityError: it is damaged, or no native engine saved it.
    """
    engine.settle()
    loaded = load_into(path, tensors_of(engine), exchange=exchange)
    age = loaded.state.get("native", {}).get("age")
    if not isinstance(age, int) or age < 0:
        raise IntegrityError("no age of the native engine", code="E_STATE")
    engine.age = age
    engine.forget_feedback()
    engine.spread_weights()
    return loaded


def _not_trained(engine: ShardedEngine) -> dict[str, Value]:
    known = {*engine.space.names, *engine.space.aliases}
    return {
        f"model/{name}": value
        for name, value in engine.model.state_dict().items()
        if name not in known and isinstance(value, torch.Tensor)
    }
