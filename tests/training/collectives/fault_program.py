"""A rank that is killed, stopped or that leaves in the middle of collectives.

Rounds of one collective until this rank hears of an error; then a smaller group of
those that are left, in the same process. The victim says on standard output when it is
in the middle, and its end is the test's doing.
"""

import json
import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist

import training.worker.backend.register  # noqa: F401
from fabric.core.errors import FabricError
from training.worker.backend.options import FabricOptions
from training.worker.backend.reform import reform

warnings.simplefilter("ignore")
torch.set_num_threads(1)

PATIENCE_SECONDS = 1.5
VICTIM = 1
NUMEL = 2_000_000


def collective(name, rank, size):
    big = torch.ones(NUMEL)
    parts = [torch.ones(NUMEL // size) for _ in range(size)]
    outs = [torch.empty(NUMEL // size) for _ in range(size)]
    match name:
        case "all_reduce":
            dist.all_reduce(big)
        case "all_gather":
            dist.all_gather(outs, parts[0])
        case "reduce_scatter":
            dist.reduce_scatter(outs[0], parts)
        case "broadcast":
            dist.broadcast(big, 0)
        case "reduce":
            dist.reduce(big, 0)
        case "all_to_all":
            dist.all_to_all(outs, parts)
        case "gather":
            dist.gather(parts[0], outs if rank == 0 else None, 0)
        case "scatter":
            dist.scatter(outs[0], parts if rank == 0 else None, 0)
        case "barrier":
            dist.barrier()


def fail(how, name, rank, size):
    """Run rounds; return the error that ended them and how long it took."""
    rounds = 0
    while True:
        if rank == VICTIM and rounds == 3:
            if how == "exit":
                os._exit(0)
            if how != "cut":
                os.kill(os.getpid(), getattr(signal, how))
            else:
                dist.group.WORLD.abort()
        started = time.monotonic()
        try:
            collective(name, rank, size)
            # a root that only sends may be far ahead: everyone meets here
            dist.barrier()
        except FabricError as error:
            return error, time.monotonic() - started
        rounds += 1


def main():
    how, name, path = sys.argv[1:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), size, rank == 0)
    options = FabricOptions(
        patience_seconds=PATIENCE_SECONDS, same_host=path == "local"
    )
    first = dist.PrefixStore("first", store)
    dist.init_process_group(
        "fabric", store=first, rank=rank, world_size=size, pg_options=options
    )
    error, seconds = fail(how, name, rank, size)
    report = {
        "code": error.code,
        "peer": getattr(error, "peer", ""),
        "reason": error.reason,
        "seconds": seconds,
        "pid": os.getpid(),
    }
    if rank != VICTIM:
        left = [r for r in range(size) if r != VICTIM]
        reform(dist.PrefixStore("second", store), left, rank, options)
        value = torch.full((300_000,), float(rank))
        dist.all_reduce(value)
        report["sum"] = value[0].item()
        report["size"] = dist.get_world_size()
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(report), flush=True)
    if rank == 0:
        time.sleep(0.2)  # the store lives here; the others say goodbye to it first
    os._exit(0)


main()
