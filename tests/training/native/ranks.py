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
import pytest
import torch
import torch.distributed as dist

from checkpoints.torch_io.exchange import TorchExchange
from checkpoints.torch_io.saver import Saver
from fabric.core.errors import LocalProtocolError, Unavailable
from fabric.jobs.messages import Setting
from fabric.jobs.spec import JobSpec, ModelSpec, OuterSpec, TrainSpec
from training.data import cut, split
from training.sharding import ISLAND, Nesting, nest
from training.sharding_bytes import Wires, memory, traffic
from training.worker import trainer as trainer_module
from training.worker.engines.native.checkpoint import load, save
from training.worker.engines.native.engine import EngineConfig, Micro, ShardedEngine
from training.worker.engines.native.lanes import Groups
from training.worker.engines.native.offload import FileStates
from training.worker.engines.native.site import Site
from training.worker.engines.native.states import AdamW, MemoryStates, owned
from training.worker.rounds import StepReady
from training.worker.trainer import Trainer

LIMIT_SECONDS = 1200
OPTIMIZER = AdamW(
    learning_rate=models.RATE,
    betas=(0.9, 0.95),
    epsilon=models.EPSILON,
    weight_decay=models.DECAY,
    grad_clip=models.CLIP,
)
QUANTISED_STEPS = 4
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
    shards = engine._sharded.shards()
    found = [
        (0, piece, master) for piece, master, _, _ in owned(engine.states, engine.owned)
    ]
    for piece in geometry.cuts[ISLAND][rank]:
        found.append((1, piece, shards[piece.tensor].float()))
    for number, piece, mine in found:
        whole = wanted[engine.space.names[piece.tensor]].view(-1)
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


def case_quantised(base, world, rank, kind, degrees, wires, reshard=True):
    """Training goes on nearly as without; bytes and residuals are what was planned."""
    wires = Wires(block=32, **wires)
    engine = engine_of(world, kind, degrees, wires=wires, reshard=reshard)
    _, losses, _ = expected(kind, steps=QUANTISED_STEPS)
    for step in range(QUANTISED_STEPS):
        taken = engine.step(micros(world, rank, step, 1, "q"))
        assert abs(taken.loss - losses[step]) < 0.05, (step, taken.loss, losses)
    engine.settle()
    check_bytes(engine, 1, rank, reshard)
    held = memory(engine.geometry, engine.wires, rank, weight_bytes=4)
    assert engine._reducer.residual_bytes == held.residuals
    assert 4 * engine._reducer.gradients.numel() == held.gradients
    check_equal(engine, rank)
    engine.close()


def case_bf16(base, world, rank, kind, degrees):
    """Weights and computation in bf16, sums and master weights in fp32."""
    engine = engine_of(world, kind, degrees, precision="bf16", checkpointing=True)
    wanted, losses, _ = expected(kind)
    for step in range(models.STEPS):
        taken = engine.step(micros(world, rank, step, 2, "b"))
        assert abs(taken.loss - losses[step]) < 0.05, (step, taken.loss, losses)
    engine.settle()
    check_bytes(engine, 2, rank)
    check_equal(engine, rank)
    master, held = differences(engine, wanted)
    assert master < 0.05
    held = memory(engine.geometry, engine.wires, rank, weight_bytes=2)
    shards = engine._sharded.shards().values()
    assert all(shard.dtype == torch.bfloat16 for shard in shards)
    assert 2 * sum(shard.numel() for shard in shards) <= held.weights
    assert 12 * sum(
        each.piece.numel for each in owned(engine.states, engine.owned)
    ) == (held.states)
    engine.close()


def check_equal(engine, rank):
    """Every island of a domain holds the same weights: summed by tensor over ranks."""
    shards = engine._sharded.shards()
    words = torch.zeros(len(engine.space.names), dtype=torch.float64)
    for piece in engine.geometry.cuts[ISLAND][rank]:
        weights = torch.arange(piece.begin, piece.end, dtype=torch.float64) % 31 + 1
        words[piece.tensor] += (shards[piece.tensor].double() * weights).sum()
    told = [torch.zeros_like(words) for _ in engine.geometry.nesting.world]
    dist.all_gather(told, words)
    nesting = engine.geometry.nesting
    for domain in nesting.domains:
        sums = [
            torch.stack([told[member] for member in island]).sum(0)
            for island in nesting.islands
            if island[0] in domain
        ]
        for other in sums:
            torch.testing.assert_close(other, sums[0], rtol=1e-9, atol=1e-9)


def case_restart(base, world, rank, kind, degrees, into, offload):
    """Saved half way by some nesting, in memory or files; any other goes on alike."""
    wanted, losses, _ = expected(kind)
    path = base / f"ckpt-{world}-{degrees}".replace(" ", "")

    def states(number):
        if not offload:
            return None
        return partial(
            FileStates, path=base / f"states-{world}-{number}-{rank}", slab_elements=50
        )

    def train(engine, first, last):
        for step in range(first, last):
            taken = engine.step(micros(world, rank, step, 1, "r"))
            assert abs(taken.loss - losses[step]) < 2e-5, (step, taken, losses)

    with Saver(path) as saver:
        first = engine_of(world, kind, degrees, make_states=states(0))
        train(first, 0, 2)
        save(saver, first, 2, {"note": "half"})
        train(first, 2, models.STEPS)
        saver.wait()
    first.settle()
    assert max(differences(first, wanted)) < 2e-5
    first.close()
    dist.barrier()
    model = models.on_meta(models.build(kind))
    second = engine_of(world, kind, into, make_states=states(1), model=model)
    loaded = load(path, second, exchange=TorchExchange())
    assert (loaded.step, loaded.state["note"], second.age) == (2, "half", 2)
    train(second, 2, models.STEPS)
    second.settle()
    assert max(differences(second, wanted)) < 2e-5
    second.close()


def case_diverged(base, world, rank, kind, degrees):
    """A loss that is not finite on one rank is an error on all, and changes nothing."""
    engine = engine_of(world, kind, degrees, wires=Wires(reduce_o="int8", block=32))
    good = micros(world, rank, 0, 1, "d")
    engine.step(good)
    before = [each.master.clone() for each in owned(engine.states, engine.owned)]
    bad = [Micro(good[0].inputs, float("nan") if rank == world - 1 else 0.1)]
    with pytest.raises(LocalProtocolError) as diverged:
        engine.step(bad)
    assert diverged.value.code == "E_DIVERGED"
    for old, each in zip(before, owned(engine.states, engine.owned), strict=True):
        assert torch.equal(old, each.master)
    engine.step(micros(world, rank, 1, 1, "d"))
    assert engine.age == 2
    engine.close()


def case_lost(base, world, rank, kind, degrees):
    """A rank that ends is an error of ours on all others, not a hang; a last case."""
    engine = engine_of(world, kind, degrees)
    engine.step(micros(world, rank, 0, 1, "l"))
    if rank == world - 1:
        os._exit(0)
    with pytest.raises(Unavailable) as lost:
        engine.step(micros(world, rank, 1, 1, "l"))
    assert lost.value.code == "E_COLLECTIVE"
    engine.close()
    os._exit(0)


def case_site(base, world, rank, degrees, wires):
    """For the outer loop a site of several ranks is one process with its batch."""
    spec = JobSpec(
        model=ModelSpec(
            hidden_size=16,
            intermediate_size=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            context_tokens=16,
        ),
        train=TrainSpec(
            batch_size=5,
            warmup_steps=2,
            outer=OuterSpec(inner_steps=2, rounds=2, quantise="none"),
        ),
    )
    nesting = nesting_of(world, degrees)
    config = EngineConfig(nesting=nesting, wires=Wires(**wires))
    groups = Groups(nesting, KNOWN)
    site = Site(spec.model, spec.train, config, groups, micro_windows=1)
    if rank:
        site.follow()
        return
    text = split(cut(b"".join(b"def f%d(x): x\n" % n for n in range(3000))), 0.2)
    trainer_module.load_corpus = lambda _spec: text
    ours = Trainer(spec, "a", engine=site)
    alone = Trainer(spec, "a")
    assert ours.initial_digest() == alone.initial_digest()
    for trainer in (ours, alone):
        trainer.hold_initial()
        trainer.steer((Setting("train.grad_clip", 0.5, "a"),))
    for _ in range(spec.train.outer.rounds):
        pieces = []
        for trainer in (ours, alone):
            while not trainer.inner_step():
                pass
            pieces.append(trainer.contribution())
        (piece, loss), (wanted, wanted_loss) = pieces
        assert piece.tokens == wanted.tokens
        assert abs(loss - wanted_loss) < 2e-5, (loss, wanted_loss)
        ready = StepReady(("a",), (wanted.payload,), (wanted.tokens,))
        for trainer in (ours, alone):
            trainer.outer_step(ready)
        assert ours.parameter_digest() == alone.parameter_digest()
        assert torch.equal(site.flat, ours.state.theta)
        assert abs(ours.evaluate() - alone.evaluate()) < 2e-5
        near = torch.frombuffer(piece.payload, dtype=torch.float32)
        exact = torch.frombuffer(wanted.payload, dtype=torch.float32)
        assert (near - exact).norm() / exact.norm() < 1e-2
    site.close()


def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def case_peak(base, world, rank, slab_elements, slabs):
    """Peak memory of a sweep: the pool with a file, everything without."""
    if rank:
        return
    spans = [(0, slab_elements * slabs)]
    path = base / "peak"
    found = []
    for make in (
        partial(FileStates, path=path, slab_elements=slab_elements),
        MemoryStates,
    ):
        before = peak_kib()
        states = make(spans)
        for slab in states.sweep():
            for value in slab[2:]:
                value.add_(1)
        found.append(peak_kib() - before)
        states.close()
    pool = 3 * 12 * slab_elements / 1024
    print(f"peak of a sweep: {found[0]} KiB with a file, {found[1]} KiB in memory")
    # pages that were there before are not counted
    assert 0.9 * pool <= found[0] <= pool + 4096, found
    assert found[1] >= slabs * pool / 3 - pool - 4096, found


def check_bytes(engine, count, rank, reshard=True):
    planned = traffic(
        engine.geometry,
        engine.space.units,
        engine.wires,
        micro_steps=count,
        reshard=reshard,
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
        started, spent = time.monotonic(), time.process_time()
        try:
            every_case()[name](base, world, rank, *arguments)
        except BaseException:
            print(f"world {world} rank {rank} {name} {arguments}", file=sys.stderr)
            raise
        gc.collect()
        if rank == 0:
            took = time.monotonic() - started
            cpu = time.process_time() - spent
            print(
                f"{world} {name} {arguments} {took:.2f} s, {cpu:.2f} s CPU", flush=True
            )
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
        named = {name for _, cases in script for name, a in cases if a[0] == kind}
        if named:
            expected(kind)
        if "quantised" in named:
            expected(kind, steps=QUANTISED_STEPS)
    gc.collect()
    gc.freeze()  # what was imported is not looked through again in every rank
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
