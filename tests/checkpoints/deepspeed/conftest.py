"""Checkpoints that real DeepSpeed engines wrote, made once; and how to read them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.formats import deepspeed_universal
from checkpoints.formats.deepspeed_groups import EXPERTS, global_expert
from checkpoints.formats.sink import Bundle, OutTensor, SinkOptions

RUNS = Path(__file__).with_name("engine_runs.py")
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
BF16 = {"config": {"bf16": {"enabled": True}}}
LOCAL_EXPERTS = EXPERT_RANKS = 2
FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
"""Engines are dear: with 1, those that differ most; else the whole grid."""


def run_engines(directory, plan):
    """Run engines in processes of their own, and fail with what they said."""
    path = directory / "plan.json"
    path.write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(RUNS), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def tensor(source, name):
    """A tensor of a source, read through small windows."""
    entry = source.entry(name)
    data = b"".join(bytes(window) for window in source.windows(name, 64))
    if not data:
        return torch.empty(entry.shape, dtype=TYPES[entry.dtype])
    flat = torch.frombuffer(bytearray(data), dtype=TYPES[entry.dtype])
    return flat.reshape(entry.shape)


def bundle_of(source):
    """What the converter hands to a sink."""
    tensors = {
        name: OutTensor(
            name,
            source.entry(name).dtype,
            tuple(source.entry(name).shape),
            lambda name=name: [bytes(window) for window in source.windows(name, 64)],
        )
        for name in source.names()
        if name not in source.aliases
    }
    return Bundle(tensors, dict(source.aliases), dict(source.state))


def write_universal(bundle, directory):
    """Write a bundle as the converter would."""
    directory.mkdir(parents=True, exist_ok=True)
    plan = deepspeed_universal.SINK.plan(bundle, SinkOptions())
    for file in plan.files:
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(bytes(chunk) for chunk in file.chunks())
        assert len(data) == file.size_bytes
        path.write_bytes(data)
    plan.finish(directory, {})
    return plan


def differences(source, other):
    """Names of tensors that are not the same bytes, type and shape in both."""
    return sorted(set(source.names()) ^ set(other.names())) + [
        name
        for name in sorted(set(source.names()) & set(other.names()))
        if (source.entry(name).dtype, tuple(source.entry(name).shape))
        != (other.entry(name).dtype, tuple(other.entry(name).shape))
        or not torch.equal(tensor(source, name), tensor(other, name))
    ]


def named(name, rank):
    """The global name of what rank ``rank`` of an engine calls ``name``."""
    first = LOCAL_EXPERTS * (rank % EXPERT_RANKS)
    return global_expert(name, first) if EXPERTS in name else name


def answers(directory):
    """What the ranks' engines said, by rank."""
    return {
        int(path.stem.removeprefix("answers")): torch.load(path, weights_only=True)
        for path in sorted(directory.glob("answers*.pt"))
    }


@pytest.fixture(scope="session")
def engines():
    """The functions above, for tests."""

    class Engines:
        run = staticmethod(run_engines)
        tensor = staticmethod(tensor)
        bundle_of = staticmethod(bundle_of)
        write_universal = staticmethod(write_universal)
        differences = staticmethod(differences)
        named = staticmethod(named)
        answers = staticmethod(answers)

    return Engines


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A directory with checkpoints by name: ``z3`` is of ZeRO-3 on two ranks."""
    base = tmp_path_factory.mktemp("deepspeed")

    def save(name, stage, **more):
        return {"do": "save", "directory": str(base / name), "stage": stage, **more}

    two = [
        *(save(f"z{stage}", stage) for stage in range(4)),
        *(save(f"b{stage}", stage, **BF16) for stage in (1, 3)),
        save("round", 2, zero={"round_robin_gradients": True}),
        save("m1", 1, moe=True),
        save("m0", 0, moe=True),
        save("later", 2, steps=4),
    ]
    four = [save("w1", 1), save("w3", 3)]
    if FACTOR > 1:
        two += [
            *(save(f"b{stage}", stage, **BF16) for stage in (0, 2)),
            save("elastic", 1, zero={"elastic_checkpoint": True}),
            save("aligned", 1, zero={"parameter_alignment": True}),
            save("m2", 2, moe=True),
        ]
        four += [save("w2", 2), save("n2", 2, moe=True)]
    tools = [
        {"do": "tools", "directory": str(base / name)}
        for name in ("z1", "z2", "z3", "b3", "w1", "w3")
    ]
    run_engines(
        base,
        [
            {"world": 2, "cases": two},
            {"world": 4, "cases": four},
            {"world": 0, "cases": tools},
        ],
    )
    return base
