"""Checkpoints that real DeepSpeed engines wrote, made once; and how to read them."""

import json
import os
import random
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoints.formats import deepspeed_universal
from checkpoints.formats.deepspeed_groups import EXPERTS, global_expert
from checkpoints.formats.pickle_values import Global, TensorRef
from checkpoints.formats.pickle_writer import Call, Instance
from checkpoints.formats.sink import Bundle, OutTensor, SinkOptions
from checkpoints.formats.torch_zip_writer import (
    NewArchive,
    NewEntry,
    tensor_call,
    whole_tensor,
)

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
        timeout=540,
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


def named(name, rank, by_block=False):
    """The global name of what rank ``rank`` of an engine calls ``name``."""
    expert_rank = rank // EXPERT_RANKS if by_block else rank % EXPERT_RANKS
    first = LOCAL_EXPERTS * expert_rank
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
    four, block = [save("w1", 1), save("w3", 3)], []
    if FACTOR > 1:
        two += [
            *(save(f"b{stage}", stage, **BF16) for stage in (0, 2)),
            save("elastic", 1, zero={"elastic_checkpoint": True}),
            save("aligned", 1, zero={"parameter_alignment": True}),
            save("m2", 2, moe=True),
        ]
        by_block = {"config": {"use_data_before_expert_parallelism": True}}
        four += [save("w2", 2), save("n2", 2, moe=True)]
        # in processes of its own: an engine takes the expert groups of one before it
        block = [save("block", 1, moe=True, **by_block)]
    tools = [
        {"do": "tools", "directory": str(base / name)}
        for name in ("z1", "z2", "z3", "b3", "w1", "w3", "round")
    ]
    run_engines(
        base,
        [
            {"world": 2, "cases": two},
            {"world": 4, "cases": four},
            *({"world": 4, "cases": [case]} for case in block),
            {"world": 0, "cases": tools},
        ],
    )
    return base


class Forge:
    """Writes ZeRO checkpoints by the book, without DeepSpeed; each part can be changed.

    Attributes:
        models: File name -> content of model states.
        ranks: File name -> content of optimizer states.
        values: Canonical name -> elements, as they should be read.
    """

    def __init__(self, groups, stage=1, world=2, seed=0, step=3.0):
        self._random = random.Random(seed)
        self._data = {}
        self.stage, self.world = stage, world
        self.values = {}
        self.models, self.ranks = {}, {}
        flat = [self._vectors(group, step) for group in groups]
        for rank in range(world):
            content = self._rank(groups, flat, rank, step)
            self.ranks[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = content
        for rank in range(world if stage == 3 else 1):
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            content = self._model(groups)
            self.models[f"{prefix}mp_rank_00_model_states.pt"] = content

    def write(self, tag):
        """Write the files."""
        tag.mkdir(parents=True, exist_ok=True)
        for name, content in {**self.models, **self.ranks}.items():
            (tag / name).write_bytes(self.archive(content))
        return tag

    def archive(self, content):
        """The bytes of a file of torch.save."""
        used = []

        def calls(value):
            if isinstance(value, TensorRef):
                if value.storage.key not in used:
                    used.append(value.storage.key)
                return tensor_call(value)
            if type(value) is tuple:
                return tuple(map(calls, value))
            if isinstance(value, list):
                return list(map(calls, value))
            if isinstance(value, dict):
                return {key: calls(each) for key, each in value.items()}
            return value

        program = calls(content)
        entries = [
            NewEntry(key, len(self._data[key]), lambda key=key: [self._data[key]])
            for key in used
        ]
        return b"".join(map(bytes, NewArchive(program, entries).chunks()))

    def vector(self, numbers, shape=None):
        """A tensor of fp32 in the archive."""
        key = str(len(self._data))
        data = self._data[key] = struct.pack(f"<{len(numbers)}f", *numbers)
        shape = (len(numbers),) if shape is None else shape
        return whole_tensor(key, "F32", shape, len(data))

    def _vectors(self, group, step):
        found = {}
        for slot in ("fp32", "exp_avg", "exp_avg_sq"):
            for name, shape in group.items():
                numbers = [self._random.random() for _ in range(prod(shape))]
                rounded = struct.unpack(
                    f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}f", *numbers)
                )
                section = "model/" if slot == "fp32" else f"optimizer/{slot}/"
                self.values[section + name] = (shape, list(rounded))
                self.values[f"optimizer/step/{name}"] = ((), [step])
                found.setdefault(slot, {})[name] = list(rounded)
        return found

    def _part(self, vectors, rank):
        """One rank's part, its padding, and where each parameter begins in it."""
        if self.stage == 3:
            part = []
            for numbers in vectors.values():
                share = -(-len(numbers) // self.world)
                mine = numbers[rank * share : (rank + 1) * share]
                part += mine + [0.0] * (share - len(mine))
            return part, 0, {}
        total = sum(map(len, vectors.values()))
        size = -(-total // (2 * self.world)) * 2
        line = [number for numbers in vectors.values() for number in numbers]
        part = line[rank * size : (rank + 1) * size]
        mapping, at = {}, 0
        for name, numbers in vectors.items():
            begin = max(at, rank * size)
            end = min(at + len(numbers), (rank + 1) * size)
            if begin < end:
                mapping[name] = (begin - rank * size, end - begin)
            at += len(numbers)
        return part, size - len(part), mapping

    def _rank(self, groups, flat, rank, step):
        masters, states, mappings, paddings = [], {}, [], []
        for index, vectors in enumerate(flat):
            part, padding, mapping = self._part(vectors["fp32"], rank)
            masters.append(self.vector(part))
            states[index] = {"step": self.vector([step], ())}
            for slot in ("exp_avg", "exp_avg_sq"):
                moment, _, _ = self._part(vectors[slot], rank)
                states[index][slot] = self.vector(moment + [0.0] * padding)
            paddings.append(padding)
            kind = Global("deepspeed.utils.tensor_fragment", "fragment_address")
            mappings.append(
                {
                    name: Instance(kind, {"start": start, "numel": numel})
                    for name, (start, numel) in mapping.items()
                }
            )
        options = [
            {"lr": 0.1, "betas": (0.9, 0.999), "params": [index]}
            for index in range(len(groups))
        ]
        base = {"state": states, "param_groups": options}
        kind = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")
        state = {"zero_stage": Call(kind, (self.stage,)), "overflow": False}
        if self.stage == 3:
            state |= {"partition_count": self.world, "optimizer_state_dict": base}
            state["fp32_flat_groups"] = masters
        else:
            state |= {
                "partition_count": [self.world] * len(groups),
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": masters,
                "group_paddings": paddings,
                "param_slice_mappings": mappings,
            }
        return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}

    def _model(self, groups):
        size = Global("torch", "Size")
        return {
            "module": {},
            "buffer_names": [],
            "param_shapes": [
                {name: Call(size, (shape,)) for name, shape in group.items()}
                for group in groups
            ],
            "shared_params": {},
            "global_steps": 5,
            "dp_world_size": self.world,
            "mp_world_size": 1,
        }


@pytest.fixture(scope="session")
def forge():
    return Forge


def flat_values(source, name):
    """The elements of a tensor of fp32."""
    data = b"".join(bytes(window) for window in source.windows(name, 40))
    return list(struct.unpack(f"<{len(data) // 4}f", data))


@pytest.fixture(scope="session")
def flat():
    return flat_values


ODD = [None, -1, 2**53, 1.5, "x", b"y", [], {}, [[]], {"a": 1}, (), True, [None, 1]]


def mutate(value, odd, at):
    """Replace the ``at``-th value below ``value``; return how many there were."""
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    seen = 0
    for key, each in items:
        if seen == at:
            value[key] = odd
            return -1
        seen += 1
        below = mutate(each, odd, at - seen)
        if below < 0:
            return -1
        seen += below
    return seen


@pytest.fixture(scope="session")
def lies():
    """Values that do not belong, and how to put one anywhere in a nested value."""

    def some(seed, count):
        return random.Random(seed).sample(ODD, min(len(ODD), count))

    return SimpleNamespace(mutate=mutate, some=some)
