"""Real ranks over gloo save with torch's own writer, and one saves the whole.

    python dcp_ranks.py DIR WORLD-LAYOUT...

writes DIR/WORLD-LAYOUT/saved (a distributed checkpoint) and whole.pt beside it (what it
must hold). Torch is imported once and forked: the import costs more than a case.
"""

import logging
import os
import random
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it: once, before the ranks are forked
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SHAPES = [(37, 11), (7, 13, 5), (33,), (2, 3), (1, 4), (8, 8)]


def content(name, dtype, shape):
    count = 1
    for extent in shape:
        count *= extent
    size = torch.empty((), dtype=dtype).element_size()
    data = random.Random(name).randbytes(count * size)
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def tensors():
    return {
        f"{str(dtype).removeprefix('torch.')}.{at}": content(
            f"{dtype}{at}", dtype, shape
        )
        for dtype in DTYPES
        for at, shape in enumerate(SHAPES)
    }


def placements(name, tensor, layout, number):
    if layout == "fsdp":
        return [Shard(0)]
    if layout == "tp":
        return [Shard(tensor.dim() - 1) if number % 3 else Replicate()]
    last = Shard(tensor.dim() - 1)
    choices = [[Shard(0), last], [Replicate(), last], [Shard(0), Replicate()]]
    return choices[number % 3] if tensor.dim() > 1 else [Shard(0), Replicate()]


def layout_state(world, layout):
    shape = (2, world // 2) if layout == "grid" else (world,)
    mesh = init_device_mesh("cpu", shape)
    whole = tensors()
    state = {
        name: distribute_tensor(
            tensor, mesh, placements(name, tensor, layout, number), src_data_rank=None
        )
        for number, (name, tensor) in enumerate(whole.items())
    }
    more = {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "tied": None}
    more["tied"] = whole["float32.0"]
    return {"model": state | more}, {"model": whole | more}


def model_state(world):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3, bias=False)
    )
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if not isinstance(layer, torch.nn.ReLU):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(4, 10)).square().sum().backward()
        optimizer.step()

    def both(**how):
        options = StateDictOptions(**how)
        return {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            "epoch": 7,
            "note": "\u00e9",
        }

    return both(), both(full_state_dict=True, cpu_offload=True)


def work(base, world, rank, layout):
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(base / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    kind = layout.split("-")[0]
    state, whole = model_state(world) if kind == "adam" else layout_state(world, kind)
    if layout.endswith("-hf"):
        writer = HuggingFaceStorageWriter(str(base / "saved"), save_distributed=True)
        state = {
            name: tensor
            for name, tensor in state["model"].items()
            if name not in ("tied", "scalar", "none")
        }
        whole = {name: whole["model"][name] for name in state}
    else:
        threads = 2 if layout.endswith("-threads") else 1
        writer = FileSystemWriter(
            str(base / "saved"),
            thread_count=threads,
            single_file_per_rank=not layout.endswith("-each"),
        )
    dcp.save(state, storage_writer=writer)
    if rank == 0:
        torch.save(whole, base / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(base, world, layout):
    base.mkdir()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(base, world, rank, layout)
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    if failed:
        sys.exit(f"{len(failed)} ranks of {world}-{layout} failed")


if __name__ == "__main__":
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        world, _, layout = case.partition("-")
        run(Path(sys.argv[1]) / case, int(world), layout)
