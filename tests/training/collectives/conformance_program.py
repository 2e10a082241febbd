"""Every collective beside gloo on random tensors; prints which cases differ."""

import json
import random
import sys
import warnings

import torch
import torch.distributed as dist

import training.worker.backend.register  # noqa: F401
from training.worker.backend.options import FabricOptions
from training.worker.collectives.links import Links, uniform_links

warnings.simplefilter("ignore")  # torch renames its collectives
torch.set_num_threads(1)

Op = dist.ReduceOp
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32, torch.int8, torch.uint8)
OPS = (Op.SUM, Op.MIN, Op.MAX, Op.PRODUCT)


class Program:
    def __init__(self, seed):
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed * 1000 + self.rank)
        self.failures = []
        self.cases = 0

    def draw(self, *shape, dtype=torch.float32):
        if dtype.is_floating_point:
            return torch.randn(*shape, generator=self.generator).to(dtype)
        if dtype is torch.bool:
            return torch.randint(0, 2, shape, generator=self.generator).bool()
        return torch.randint(0, 3, shape, generator=self.generator).to(dtype)

    def number(self):
        """Sizes with odd, empty and larger than a piece; the same on all ranks."""
        return self.rng.choice([0, 1, 2, 7, 64, 1000, 4097, 300_001])

    def compare(self, name, run):
        """Run on clones with both groups; the results must be close."""
        self.cases += 1
        results = []
        for group in (None, self.group):
            results.append(run(group))
        for a, b in zip(*results, strict=True):
            tolerance = 2e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-5
            if a.is_floating_point():
                a, b = a.double(), b.double()
            same = torch.allclose(a, b, rtol=tolerance, atol=tolerance * self.size)
            if not same:
                self.failures.append(name)

    def reduced(self, dtype, op):
        n = self.number()
        value = self.draw(n, dtype=dtype)
        root = self.rng.randrange(self.size)

        def all_reduce(group):
            mine = value.clone()
            dist.all_reduce(mine, op, group=group)
            return [mine]

        def reduce(group):
            mine = value.clone()
            dist.reduce(mine, root, op, group=group)
            if self.rank != root and group is not None:
                assert torch.equal(mine, value), "a rank that is not root was changed"
            return [mine] if self.rank == root else []

        def reduce_scatter(group):
            out = torch.empty(n, dtype=dtype)
            whole = value.repeat(self.size)
            dist.reduce_scatter_tensor(out, whole, op, group=group)
            return [out]

        self.compare(f"all_reduce {dtype} {op} {n}", all_reduce)
        self.compare(f"reduce {dtype} {op} {n}", reduce)
        if op == Op.SUM and n:
            self.compare(f"reduce_scatter {dtype} {op} {n}", reduce_scatter)

    def moved(self, dtype):
        n = self.number()
        value = self.draw(n, dtype=dtype)
        root = self.rng.randrange(self.size)
        size, rank = self.size, self.rank

        def broadcast(group):
            mine = value.clone()
            dist.broadcast(mine, root, group=group)
            return [mine]

        def all_gather(group):
            outs = [torch.empty(n, dtype=dtype) for _ in range(size)]
            dist.all_gather(outs, value, group=group)
            return outs

        def into_tensor(group):
            out = torch.empty(n * size, dtype=dtype)
            dist.all_gather_into_tensor(out, value, group=group)
            return [out]

        def gather(group):
            outs = [torch.empty(n, dtype=dtype) for _ in range(size)]
            dist.gather(value, outs if rank == root else None, root, group=group)
            return outs if rank == root else []

        def scatter(group):
            out = torch.empty(n, dtype=dtype)
            given = (
                [(value + i).to(dtype) for i in range(size)] if rank == root else None
            )
            dist.scatter(out, given, root, group=group)
            return [out]

        for run in (broadcast, all_gather, gather, scatter):
            self.compare(f"{run.__name__} {dtype} {n}", run)
        if n:
            self.compare(f"into_tensor {dtype} {n}", into_tensor)

    def exchanged(self, dtype):
        table = [
            [self.rng.choice([0, 1, 3, 50_000]) for _ in range(self.size)]
            for _ in range(self.size)
        ]
        given = table[self.rank]
        taken = [row[self.rank] for row in table]
        value = self.draw(sum(given), 2, dtype=dtype)
        lists = [self.draw(5, dtype=dtype) for _ in range(self.size)]

        def single(group):
            out = torch.empty(sum(taken), 2, dtype=dtype)
            dist.all_to_all_single(out, value, taken, given, group=group)
            return [out]

        def listed(group):
            outs = [torch.empty(5, dtype=dtype) for _ in range(self.size)]
            dist.all_to_all(outs, [t.clone() for t in lists], group=group)
            return outs

        def neighbours(group):
            """Everyone sends more than a socket holds before anyone receives."""
            out = torch.empty(700_000)
            mine = torch.full((700_000,), float(self.rank))
            ops = [
                dist.P2POp(dist.isend, mine, (self.rank + 1) % self.size, group),
                dist.P2POp(dist.irecv, out, (self.rank - 1) % self.size, group),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            return [out]

        self.compare(f"all_to_all_single {table}", single)
        self.compare("all_to_all", listed)
        if self.size > 1:
            self.compare("neighbours", neighbours)

    def only_ours(self):
        """What gloo cannot do, against its meaning."""
        group, size = self.group, self.size
        mine = torch.full((1001,), float(self.rank))
        dist.all_reduce(mine, Op.AVG, group=group)
        out = torch.empty(5)
        dist.reduce_scatter_tensor(
            out, torch.ones(5 * size), dist._make_nccl_premul_sum(0.5), group=group
        )
        works = [
            dist.all_reduce(torch.full((n,), 1.0), group=group, async_op=True)
            for n in (3, 700_000, 0, 5)
        ]
        values = [work.get_future().wait()[0] for work in works]
        dist.barrier(group)
        objects = [None] * size
        dist.all_gather_object(objects, {"rank": self.rank}, group=group)
        wide = torch.ones(1001, 2)
        dist.all_reduce(wide[:, 0], group=group)
        one = torch.ones(1, 2)
        dist.all_reduce(one[:, 0], group=group)
        checks = {
            "column": bool((wide == torch.tensor([size, 1.0])).all()),
            "element": one.tolist() == [[size, 1.0]],
            "avg": bool((mine == (size - 1) / 2).all()),
            "premul": bool((out == size / 2).all()),
            "async": all(bool((v == size).all()) for v in values),
            "objects": objects == [{"rank": r} for r in range(size)],
        }
        self.cases += len(checks)
        self.failures += [name for name, right in checks.items() if not right]

    def run(self, options):
        self.group = dist.new_group(backend="fabric", pg_options=options)
        for dtype in (*FLOATS, *INTS):
            for op in OPS:
                self.reduced(dtype, op)
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            self.moved(dtype)
        self.exchanged(torch.float32)
        self.only_ours()
        dist.destroy_process_group(self.group)


def islands(size):
    """Return links of two islands with a slow boundary."""
    half = size // 2

    def rate(a, b):
        return 1e9 if (a < half) == (b < half) else 1e7

    table = tuple(tuple(rate(a, b) for b in range(size)) for a in range(size))
    group = (tuple(range(half)), tuple(range(half, size)))
    return Links(uniform_links(size).latency, table, group, 1e7)


def main():
    program = Program(int(sys.argv[1]))
    size = program.size
    for algorithm in ("", "ring", "doubling", "direct", "tree", "exchange"):
        program.run(FabricOptions(algorithm=algorithm))
    program.run(FabricOptions(same_host=False))
    if size > 2:
        program.run(FabricOptions(algorithm="islands", links=islands(size)))
    result = {"cases": program.cases, "failures": program.failures}
    dist.destroy_process_group()
    print(json.dumps(result), flush=True)


main()
