"""Real DeepSpeed engines on gloo: saves, loads, and what DeepSpeed's own tools make.

Run as a program: ``python engine_runs.py PLAN.json``. It imports DeepSpeed once and
forks the ranks of each run: the import costs more than all that they then do. So do
torch's compilers, which an optimiser imports with its first step: imported here, too.
"""

import json
import os
import sys
import traceback
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
# compiled at import where it is missing, for minutes, under a lock that outlives a kill
os.environ.setdefault("TORCH_EXTENSIONS_DIR", "/nonexistent")

import deepspeed
import deepspeed.comm
import torch
import torch._dynamo
import torch._inductor.compile_fx
from deepspeed.checkpoint import ds_to_universal
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import (
    split_params_into_different_moe_groups_for_optimizer as split_experts,
)
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

# gloo does what this op would speed up
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

VOCABULARY, WIDTH = 53, 7
"""Odd products, so that every partition has padding."""


class Model(torch.nn.Module):
    """Tied, frozen and plain weights, and buffers."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.mix = torch.nn.Linear(WIDTH, 5)
        self.back = torch.nn.Linear(5, WIDTH, bias=False)
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.register_buffer("ticks", torch.arange(3))
        self.register_buffer("means", torch.linspace(0.0, 1.0, 7))
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.embed(tokens)
        hidden = hidden + self.back(torch.tanh(self.mix(self.frozen(hidden))))
        return self.head(self.norm(hidden) * self.scale)


class Experts(torch.nn.Module):
    """Four experts; each rank has two."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        expert = torch.nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(WIDTH, expert, num_experts=4, ep_size=2, k=1, min_capacity=4)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        hidden, _, _ = self.moe(self.embed(tokens))
        return self.head(hidden)


def build(case):
    """One engine, its weights a function of the case alone."""
    torch.manual_seed(7)
    model = Experts() if case.get("moe") else Model()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if case.get("moe"):
        groups[0]["name"] = "dense"
        groups = split_experts(groups)
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": case["stage"],
            # the default keeps small parameters whole on every rank
            "stage3_param_persistence_threshold": 0,
            **case.get("zero", {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": case["do"] == "load"},
        **case.get("config", {}),
    }
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, lr_scheduler=scheduler
    )
    return engine


def train(engine, rank, steps=3):
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * rank + step)
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        engine.backward(engine(tokens).float().square().mean())
        engine.step()


def full(engine):
    """DeepSpeed's own answer to what every parameter and moment is."""
    relink = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if relink is not None:
        # done once, after the first group's step, when later groups have no state yet
        engine.optimizer._hp_optimizer_states_linked = False
        relink()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"fp32/{name}"] = safe_get_full_fp32_param(parameter)
        for slot in ("exp_avg", "exp_avg_sq"):
            found[f"{slot}/{name}"] = safe_get_full_optimizer_state(parameter, slot)
    return {name: each.clone() for name, each in found.items() if each is not None}


def module(engine):
    """The module's tensors, whole, as it computes with them."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return {n: t.detach().clone() for n, t in engine.module.state_dict().items()}


def save(case, rank, world):
    """Train some steps and save, with the engine's own answers beside."""
    engine = build(case)
    train(engine, rank, case.get("steps", 3))
    client = {"note": "\u00e9", "position": [0, 12], "seen": torch.arange(4)}
    if not case.get("moe"):  # ds_to_universal wants it, an engine with experts refuses
        client["universal_checkpoint_info"] = {"universal_checkpoint_version": 0.2}
    directory = Path(case["directory"])
    engine.save_checkpoint(str(directory), tag="t1", client_state=client)
    answers = {"module": module(engine)}
    if case["stage"]:
        answers["full"] = full(engine)
    if rank == 0 or case.get("moe"):
        torch.save(answers, directory / f"answers{rank}.pt")


def load(case, rank, world):
    """Resume from a universal checkpoint; the tag is found by latest_universal."""
    engine = build(case)
    path, client = engine.load_checkpoint(case["directory"])
    assert path is not None
    answers = {"full": full(engine), "module": module(engine)}
    answers["steps"] = engine.global_steps
    answers["note"] = client.get("note")
    answers["lr"] = [group["lr"] for group in engine.optimizer.param_groups]
    train(engine, 0, steps=1)
    answers["after"] = full(engine)
    if rank == 0:
        torch.save(answers, case["answers"])


def tools(case, rank, world):
    """What DeepSpeed's offline tools make of a saved checkpoint."""
    directory = case["directory"]
    state = get_fp32_state_dict_from_zero_checkpoint(directory, tag="t1")
    torch.save(OrderedDict(state), Path(directory) / "zero_to_fp32.pt")
    arguments = type("Arguments", (), {})()
    arguments.input_folder = f"{directory}/t1"
    arguments.output_folder = f"{directory}/uni"
    arguments.num_extract_workers = arguments.num_merge_workers = 1
    arguments.keep_temp_folder = arguments.inject_missing_state = False
    arguments.strict = True
    ds_to_universal.main(arguments)


DO = {"save": save, "load": load, "tools": tools}


def rank_main(run, rank, store):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["world"])
    )
    if run["world"]:
        deepspeed.init_distributed(
            "gloo",
            auto_mpi_discovery=False,
            init_method=f"file://{store}",
            rank=rank,
            world_size=run["world"],
            timeout=timedelta(seconds=180),
            verbose=False,
        )
    for case in run["cases"]:
        DO[case["do"]](case, rank, run["world"])
    if run["world"]:
        deepspeed.comm.barrier()
        torch.distributed.destroy_process_group()


def fork(run, rank, store):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        rank_main(run, rank, store)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked rank must never run on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    for index, run in enumerate(plan):
        store = Path(f"{sys.argv[1]}.store{index}")
        store.unlink(missing_ok=True)
        pids = [fork(run, rank, store) for rank in range(max(1, run["world"]))]
        ended = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(ended):
            sys.exit(f"run {index} failed")


if __name__ == "__main__":
    main()
