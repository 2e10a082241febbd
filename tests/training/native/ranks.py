"""Real ranks over gloo: forked once for each world, each runs a list of cases.

    python ranks.py DIR SCRIPT.json

SCRIPT: ``[[world, [[case, arguments], ...]], ...]``. Torch is imported once and forked.
"""

import faulthandler
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import models
import torch
import torch.distributed as dist

from training.sharding import DOMAIN, ISLAND, Nesting, nest
from training.sharding_bytes import traffic
from training.worker.engines.native.engine import EngineConfig, Micro, ShardedEngine
from training.worker.engines.native.lanes import Groups
from training.worker.engines.native.space import packed
from training.worker.engines.native.states import AdamW

LIMIT_SECONDS = 1200
OPTIMIZER = AdamW(
    learning_rate=models.RATE,
    betas=(0.9, 0.95),
    epsilon=models.EPSILON,
    weight_decay=models.DECAY,
    grad_clip=models.CLIP,
)
KNOWN = {}


@lru_cache
def expected(kind, clip=models.CLIP, steps=models.STEPS):
    return models.reference(kind, clip, steps)


def nesting_of(world, degrees):
    if isinstance(degrees, str):
        return uneven(world, degrees)
    return nest(world, *degrees)


def uneven(world, seed):
    """Any nesting: sets of random sizes, of ranks in any order."""
    rng = random.Random(seed)
    ranks = list(range(world))
    rng.shuffle(ranks)

    def join(parts):
        parts, joined = list(parts), []
        while parts:
            count = rng.randint(1, len(parts))
            joined.append(
                tuple(sorted(rank for part in parts[:count] for rank in part))
            )
            parts = parts[count:]
        return tuple(joined)

    islands = join([(rank,) for rank in ranks])
    groups = join(islands)
    return Nesting(islands, groups, join(groups))


def micros(world, rank, step, count, seed):
    """This rank's part of a global batch, cut unevenly; a part may be empty."""
    rng = random.Random(f"{seed}{step}")
    edges = sorted(rng.randint(0, models.SAMPLES) for _ in range(world * count - 1))
    edges = [0, *edges, models.SAMPLES]
    tokens = models.samples(step)
    found = []
    for number in range(rank * count, (rank + 1) * count):
        begin, end = edges[number], edges[number + 1]
        part = tokens[begin:end] if end > begin else tokens[:1]
        found.append(Micro(part, (end - begin) / models.SAMPLES))
    return found


def engine_of(world, kind, degrees, **more):
    nesting = nesting_of(world, degrees)
    make = more.pop("make_states", None)
    model = more.pop("model", None) or models.build(kind)
    config = EngineConfig(nesting=nesting, **{"optimizer": OPTIMIZER, **more})
    groups = Groups(nesting, KNOWN)
    extra = {} if make is None else {"make_states": make}
    return ShardedEngine(model, models.loss_of, config, groups, **extra)


def differences(engine, wanted):
    """Largest difference of the master weights and of the weights from ``wanted``."""
    worst = [0.0, 0.0]
    geometry, rank = engine.geometry, engine.rank
    places = packed(geometry.cuts[DOMAIN][rank])
    shards = engine._sharded.shards()
    for number, level in enumerate((DOMAIN, ISLAND)):
        for piece in geometry.cuts[level][rank]:
            whole = wanted[engine.space.names[piece.tensor]].view(-1)
            if level == DOMAIN:
                mine = engine.states.whole().master[places.of(piece)]
            else:
                mine = shards[piece.tensor].float()
            gap = (mine - whole[piece.begin : piece.end]).abs().max()
            worst[number] = max(worst[number], float(gap))
    return worst


def case_oracle(base, world, rank, kind, degrees, count=2, more=None):
    """A step equals one process's, and sends what the closed form says."""
    engine = engine_of(world, kind, degrees, **(more or {}))
    wanted, losses, norms = expected(kind)
    for step in range(models.STEPS):
        taken = engine.step(micros(world, rank, step, count, str(degrees)))
        assert abs(taken.loss - losses[step]) < 2e-5, (step, taken, losses)
        assert abs(taken.norm / norms[step] - 1) < 2e-4, (step, taken, norms)
    engine.settle()
    master, held = differences(engine, wanted)
    assert master < 2e-5, (master, held)
    assert held < 2e-5, (master, held)
    check_bytes(engine, count, rank, (more or {}).get("reshard", True))
    engine.close()


def check_bytes(engine, count, rank, reshard=True):
    gathers = {True: 2, False: 1}[reshard]
    planned = traffic(
        engine.geometry,
        engine.space.units,
        engine.wires,
        micro_steps=count,
        weight_gathers=gathers,
        frozen=engine.space.frozen,
    )
    sent = {f: n for f, n in engine.ledger.sent.items() if f.operation != "norm"}
    mine = {f: n * engine.age for f, n in planned.items() if f.source == rank}
    assert sent == mine, (sent, mine)


def work(base, world, rank, store, cases):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for name, arguments in cases:
        started = time.monotonic()
        try:
            every_case()[name](base, world, rank, *arguments)
        except BaseException:
            print(f"world {world} rank {rank} {name} {arguments}", file=sys.stderr)
            raise
        gc.collect()
        if rank == 0:
            took = time.monotonic() - started
            print(f"{world} {name} {arguments} {took:.2f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def every_case():
    found = {n: f for n, f in globals().items() if n.startswith("case_")}
    return {name.removeprefix("case_"): case for name, case in found.items()}


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
    torch.set_num_threads(1)  # before the fork: threads do not survive it
    for kind in ("odd", "gpt2", "llama", "llama-tied"):
        if any(kind == a[0] for _, cases in script for _, a in cases if a):
            expected(kind)
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
    sys.setswitchinterval(0.001)
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
