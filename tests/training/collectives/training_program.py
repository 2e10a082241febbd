"""Programs that know nothing of us, on gloo and on fabric: the same losses.

DDP, FSDP2 on one and on two mesh dimensions, DeepSpeed ZeRO-3 where it is asked for.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import training.worker.backend.register  # noqa: F401

warnings.simplefilter("ignore")
STEPS = 4


def build():
    torch.manual_seed(0)
    # odd sizes: shards are uneven
    return nn.Sequential(
        nn.Linear(17, 33), nn.GELU(), nn.Linear(33, 31), nn.Linear(31, 5)
    )


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(8, 17, generator=generator)
    return x, x[:, :5].sin()


def losses(model, optimizer, rank):
    found = []
    for step in range(STEPS):
        x, y = batch(step, rank)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append(mean.item() / dist.get_world_size())
    return found


def ddp(rank, world):
    model = DistributedDataParallel(build())
    return losses(model, torch.optim.AdamW(model.parameters(), 1e-2), rank)


def fsdp(rank, world, shape):
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = build()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return losses(model, torch.optim.AdamW(model.parameters(), 1e-2), rank)


def zero_3(rank, world):
    import deepspeed

    # compiled on first use, for half a minute; our backend does what it would speed up
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="fabric", verbose=False)
    model = build()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=torch.optim.AdamW(model.parameters(), 1e-2),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    found = []
    for step in range(STEPS):
        x, y = batch(step, rank)
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append(mean.item() / world)
    return found


def main():
    result = {}
    for backend in ("gloo", "fabric"):
        dist.init_process_group(backend)
        rank, world = dist.get_rank(), dist.get_world_size()
        result[f"ddp {backend}"] = ddp(rank, world)
        result[f"fsdp2 {backend}"] = fsdp(rank, world, (world,))
        if world % 2 == 0:
            result[f"hsdp {backend}"] = fsdp(rank, world, (2, world // 2))
        if backend == "fabric" and "zero3" in sys.argv:
            result["zero3 fabric"] = zero_3(rank, world)
        dist.destroy_process_group()
    print(json.dumps(result), flush=True)


main()
