"""Real ranks over gloo: forks them, runs a list of cases in each, says what failed.

    python ranks.py DIR SCRIPT.json

SCRIPT: ``[[world, [[case, arguments], ...]], ...]``, one world after the other. Torch
is imported once and forked, because the import costs more than most cases.
"""

import faulthandler
import json
import os
import random
import signal
import sys
import traceback
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from checkpoints.torch_io.exchange import LocalExchange, TorchExchange
from checkpoints.torch_io.loader import LoadOptions, load_into
from checkpoints.torch_io.pieces import FlatShard
from checkpoints.torch_io.saver import Saver
from checkpoints.torch_io.tensors import DTYPES, byte_view, load_tensors
from fabric.core.errors import FabricError, IntegrityError

LIMIT_SECONDS = 300
"""A rank that takes longer in one world says where it is, and ends."""
NAMES = {
    "w": (torch.float32, (13, 8)),
    "half": (torch.bfloat16, (8, 6)),
    "eight": (torch.float8_e4m3fn, (16, 4)),
    "ids": (torch.int64, (10,)),
    "mask": (torch.bool, (5, 3)),
    "cube": (torch.float32, (4, 6, 5)),
    "tiny": (torch.float16, (1, 2)),
    "scalar": (torch.float32, ()),
    "empty": (torch.float32, (0, 4)),
    "expert.0": (torch.float32, (6, 4)),
    "expert.1": (torch.bfloat16, (6, 4)),
    "expert.2": (torch.float32, (6, 4)),
}


def content(name):
    """The whole tensor: a function of its name."""
    dtype, shape = NAMES[name]
    count = 1
    for extent in shape:
        count *= extent
    size = torch.empty((), dtype=dtype).element_size()
    raw = random.Random(name).randbytes(count * size)
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def spread(tensor, mesh, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def factors(world):
    inner = next((k for k in (2, 3) if world % k == 0), 1)
    return world // inner, inner


def flat(name, tensor, world, rank, seed):
    """An irregular interval of the flattened tensor; every rank knows all cuts."""
    count = tensor.numel()
    rng = random.Random(f"{name}{seed}")
    cuts = sorted(rng.randint(0, count) for _ in range(world - 1))
    edges = [0, *cuts, count]
    begin, end = edges[rank], edges[rank + 1]
    return FlatShard(tensor.flatten()[begin:end].clone(), tuple(tensor.shape), begin)


@lru_cache
def mesh_of(shape):
    """Made once: the groups of a mesh cost more than all else here."""
    return init_device_mesh("cpu", shape)


@lru_cache
def exchange_of(world):
    return TorchExchange() if world > 1 else LocalExchange()


def build(layout, world, rank):
    """What this rank holds in a layout: name -> value."""
    line = mesh_of((world,))
    grid = mesh_of(factors(world))
    held = {}
    for number, name in enumerate(NAMES):
        whole = content(name)
        two = whole.dim() > 1
        match layout:
            case "plain":
                value = whole
            case "fsdp":
                value = spread(whole, line, [Shard(0)]) if whole.dim() else whole
            case "tp":
                value = spread(whole, line, [Shard(1) if two else Replicate()])
            case "hsdp":
                rows = Shard(0) if whole.dim() else Replicate()
                value = spread(whole, grid, [Replicate(), rows])
            case "fsdp_tp":
                choices = [[Replicate(), Replicate()]]
                if whole.dim():
                    strided = _StridedShard(0, split_factor=grid.size(1))
                    choices = [[strided, Shard(0)], [Shard(0), Replicate()]]
                if two:
                    choices += [[Shard(0), Shard(1)], [Shard(1), Shard(1)]]
                value = spread(whole, grid, choices[number % len(choices)])
            case "pp":
                if number % world != rank:
                    continue
                value = whole
            case "ep":
                if name.startswith("expert") and number % world != rank:
                    continue
                value = whole
            case "flat":
                value = flat(name, whole, world, rank, world)
            case _:
                raise ValueError(layout)
        held[f"model/{name}"] = value
    if "model/cube" in held and layout == "plain":
        held["model/cube"] = (
            held["model/cube"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        )
    if "model/w" in held and layout != "pp":
        held["model/tied"] = held["model/w"]
    return held


def local_of(value):
    if isinstance(value, FlatShard):
        return value.data
    return value.to_local() if isinstance(value, DTensor) else value


def spoil(held):
    for value in held.values():
        local = local_of(value).detach()
        local.copy_(torch.ones_like(local))


def bits(value):
    return bytes(byte_view(local_of(value).detach().contiguous()))


def case_save(base, world, rank, layout, step=0):
    with Saver(base / f"{layout}-{world}", exchange=exchange_of(world)) as saver:
        saver.save(
            step,
            build(layout, world, rank),
            {"note": layout},
            rank_state={"position": rank},
        )
        root = saver.wait()
    assert len(root) == 64


def case_load(base, world, rank, source, layout, together=False):
    wanted = build(layout, world, rank)
    held = build(layout, world, rank)
    spoil(held)
    exchange = exchange_of(world if together else 1)
    loaded = load_into(
        base / source,
        held,
        LoadOptions(
            allow_unexpected=not together or layout == "pp",
            allow_missing=source.startswith("pp"),
        ),
        exchange=exchange,
    )
    assert loaded.missing in ([], ["model/tied"]), loaded.missing
    assert loaded.state["note"] == source.split("-")[0]
    positions = [
        loaded.state["ranks"][str(k)]["position"]
        for k in range(int(source.split("-")[1]))
    ]
    assert positions == list(range(len(positions)))
    for name, value in wanted.items():
        assert bits(value) == bits(held[name]), f"{name} differs"


def case_whole(base, world, rank, source):
    """Every element of a saved checkpoint, read by itself."""
    found = load_tensors(base / source)
    for name in NAMES:
        assert bits(found[f"model/{name}"]) == bits(content(name).contiguous()), name
    assert {t.dtype for t in found.values()} <= set(DTYPES.values())


def case_cache(base, world, rank):
    """Plans are made once for a layout, and again when anything of it changes."""
    mesh = mesh_of((world,))
    a, b = torch.zeros(8, 8), torch.zeros(4)
    steps = [
        ({"a": spread(a, mesh, [Shard(0)]), "b": b}, 1),
        ({"a": spread(a + 1, mesh, [Shard(0)]), "b": b + 1}, 1),
        ({"a": spread(a, mesh, [Shard(1)]), "b": b}, 2),  # boxes
        ({"a": spread(a, mesh, [Shard(0)]), "b": b.double()}, 3),  # dtype
        ({"a": spread(a, mesh, [Shard(0)]), "b": torch.zeros(5)}, 4),  # shape
        ({"a": spread(a, mesh, [Shard(0)]), "c": b}, 5),  # name
        (
            {"a": spread(a, mesh, [Shard(0)]), "c": b}
            | ({"d": b} if rank == 0 else {}),
            6,
        ),
        ({"a": spread(a, mesh, [Shard(0)]), "c": b}, 6),
    ]
    with Saver(base / "cache") as saver:
        for step, (tensors, gathered) in enumerate(steps):
            saver.save(step, tensors)
            saver.wait()
            assert saver._agreement.gathered == gathered, (
                step,
                saver._agreement.gathered,
            )
            found = load_tensors(base / "cache" / f"step-{step}")
            for name, value in tensors.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                assert torch.equal(found[name], whole), (step, name)
            dist.barrier()


def case_errors(base, world, rank):
    """One rank's failure is everyone's; nothing is left of it; saving goes on."""
    directory = base / "errors"
    good = {"a": torch.arange(6.0)}
    last = world - 1
    with Saver(directory) as saver:
        saver.save(0, good)
        root = saver.wait()

        def refused(code, step, tensors, state=None, told=True):
            def attempt():
                saver.save(step, tensors, state)
                saver.wait()

            with pytest.raises(FabricError) as error:
                attempt()
            assert error.value.code == code
            assert not told or f"rank {last}: " in error.value.reason
            dist.barrier()
            assert not (directory / f"step-{step}.tmp").exists()
            dist.barrier()

        refused("E_STEP_EXISTS", 0, good, told=False)
        wrong = {"a": torch.zeros(6, device="meta")} if rank == last else good
        refused("E_TENSOR", 1, wrong)
        refused("E_PLAN", 1, {"a": torch.zeros(6 + (rank == last))}, told=False)
        part = FlatShard(torch.zeros(1), (9,), 0)
        refused("E_GAP", 1, {"a": part}, told=False)
        bad = {"a": float("nan")} if rank == last else {}
        refused("E_NOT_JSON", 1, good, bad)
        dist.barrier()
        saver.save(1, good)
        assert saver.wait() != root
        dist.barrier()
    if rank == 0:
        assert sorted(p.name for p in directory.iterdir()) == [
            "latest",
            "step-0",
            "step-1",
        ]


def case_damage(base, world, rank, source):
    """A block that one rank reads for all is damaged: all are told, with the block."""
    path = base / source / "step-0"
    dist.barrier()
    if rank == 0:
        file = max(path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    held = {
        "model/w": content("w"),
        "model/cube": content("cube"),
        "model/half": content("half"),
    }
    held |= {f"model/{name}": content(name) for name in NAMES}
    with pytest.raises(IntegrityError) as damaged:
        load_into(
            path, held, LoadOptions(allow_unexpected=True), exchange=TorchExchange()
        )
    assert damaged.value.code == "E_BLOCK"
    assert ".safetensors" in damaged.value.reason


def case_once(base, world, rank):
    """Together, ranks read each window once; apart, each reads all."""
    directory = base / "once"
    big = torch.arange(6 << 20, dtype=torch.float32).reshape(6, -1)
    with Saver(directory) as saver:
        saver.save(0, {"big": big})
        saver.wait()
    import checkpoints.torch_io.load_exchange as module
    import checkpoints.torch_io.loader as loader

    reads = []

    def counted(*arguments, **more):
        reads.append(module.read_exchanged(*arguments, **more))
        return reads[-1]

    loader.read_exchanged = counted
    held = {"big": torch.zeros_like(big)}
    load_into(directory, held, exchange=TorchExchange())
    assert torch.equal(held["big"], big)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([sum(reads)]))
    assert sum(int(c) for c in counts) == 7  # 24 MiB and a header
    assert max(map(int, counts)) - min(map(int, counts)) <= 1
    loader.read_exchanged = module.read_exchanged


def work(base, world, rank, store, cases):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    for name, arguments in cases:
        try:
            every_case()[name](base, world, rank, *arguments)
            dist.barrier()
        except BaseException:
            print(f"world {world} rank {rank} {name} {arguments}", file=sys.stderr)
            raise
    dist.destroy_process_group()


def every_case():
    cases = {
        n.removeprefix("case_"): f
        for n, f in globals().items()
        if n.startswith("case_")
    }
    try:
        import rank_programs
    except ImportError:
        return cases
    return cases | rank_programs.CASES


def fork(call):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        call()
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(base, script):
    for number, (world, cases) in enumerate(script):
        store = base / f"store-{number}"
        left = {
            fork(partial(work, base, world, rank, store, cases))
            for rank in range(world)
        }
        while left:
            pid, status = os.wait()
            left.discard(pid)
            if status:
                for other in left:  # they would wait for the one that failed
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"world {world}: a rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
