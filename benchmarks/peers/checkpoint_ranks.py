"""Ranks that save and load one state: ours, torch's DCP and the raw limits in turn.

    python -m benchmarks.peers.checkpoint_ranks '{"world": 4, "layout": "fsdp", ...}'

Prints one JSON object: measure -> list of [seconds, CPU seconds of all ranks].
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.peers.checkpoint_state import build, local, num_bytes
from checkpoints.torch_io.exchange import default_exchange
from checkpoints.torch_io.loader import load_into
from checkpoints.torch_io.save_agreement import Agreement
from checkpoints.torch_io.saver import Saver
from checkpoints.writer import CheckpointWriter

CALL_BYTES = 16 << 20
Times = dict[str, list[list[float]]]


class Bench:
    """One rank of a measurement."""

    def __init__(self, plan: dict[str, object], rank: int) -> None:
        self.rank = rank
        self.world = int(str(plan["world"]))
        self.base = Path(str(plan["base"]))
        self.rounds = int(str(plan["rounds"]))
        self.layout = str(plan["layout"])
        self.source = str(plan.get("source", ""))
        mesh = init_device_mesh("cpu", (self.world,)) if self.world > 1 else None
        self.state = build(self.layout, mesh, rank)
        self.size = num_bytes(self.state)
        self.buffer = torch.full((self.size,), 1, dtype=torch.uint8)
        # torch's asynchronous save talks in a thread: not in the group of the barriers
        self.side = dist.new_group(backend="gloo") if self.world > 1 else None
        self.times: Times = {}

    def timed(self, name: str, work: Callable[[], object]) -> None:
        """Add the time from all ranks' begin to the last one's end."""
        self.meet()
        cpu, start = time.process_time(), time.perf_counter()
        work()
        self.meet()
        took = time.perf_counter() - start
        spent = torch.tensor([time.process_time() - cpu])
        if self.world > 1:
            dist.all_reduce(spent)
        self.times.setdefault(name, []).append([took, float(spent)])

    def meet(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def change(self) -> None:
        """Train a little: otherwise nothing would have to be written."""
        for value in self.state.values():
            local(value).add_(1.0)

    def remove(self, path: Path) -> None:
        """Delete what is not needed any more; not timed."""
        self.meet()
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        self.meet()

    def copy(self) -> None:
        """Copy the state into memory that is there: the least a stall can be."""
        at = 0
        for value in self.state.values():
            flat = local(value).reshape(-1).view(torch.uint8)
            self.buffer[at : at + flat.numel()] = flat
            at += flat.numel()

    def raw_write(self, path: Path) -> None:
        """Write as many bytes to a file, and sync it."""
        view = memoryview(self.buffer.numpy())
        fd = os.open(path / f"raw-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for at in range(0, len(view), CALL_BYTES):
            part = view[at : at + CALL_BYTES]
            while part:
                part = part[os.write(fd, part) :]
        os.fsync(fd)
        os.close(fd)

    def raw_read(self) -> None:
        """Read as many bytes as this rank needs, of the files one after the other.

        Ranks begin at different places, so that none reads what another has cached.
        """
        view = memoryview(self.buffer.numpy())
        files = sorted((self.base / self.source).rglob("*.safetensors"))
        skip = sum(file.stat().st_size for file in files) * self.rank // self.world
        done = 0
        for file in files + files:
            size = file.stat().st_size
            with file.open("rb", buffering=0) as opened:
                opened.seek(min(skip, size))
                skip = max(0, skip - size)
                while done < len(view):
                    count = opened.readinto(view[done : done + CALL_BYTES])
                    if not count:
                        break
                    done += count

    def save(self) -> None:
        """Save: the stall, the whole, raw and torch's."""
        ours, theirs = self.base / f"ours-{self.layout}-{self.world}", self.base / "dcp"
        writer = {"sync_files": True}
        with Saver(ours) as saver:
            for number in range(self.rounds + 1):
                self.change()
                self.timed("memcpy", self.copy)
                self.timed("stall", lambda step=number: saver.save(step, self.state))
                self.timed("rest", saver.wait)
                self.timed("raw", lambda: self.raw_write(self.base))
                path = theirs / str(number)
                storage = dcp.FileSystemWriter(path, **writer)
                self.timed(
                    "dcp", lambda s=storage: dcp.save(self.state, storage_writer=s)
                )
                if number:
                    self.remove(ours / f"step-{number - 1}")
                    self.remove(theirs / str(number - 1))
                    self.stall_of_dcp(number)
        self.drop_first()
        self.meet()
        if self.rank == 0:
            kept = self.base / f"dcp-{self.layout}-{self.world}"
            (theirs / str(self.rounds)).rename(kept)
        self.plans()

    def stall_of_dcp(self, number: int) -> None:
        """Measure how long torch's asynchronous save holds up training."""
        path = self.base / "dcp" / f"async-{number}"
        storage = dcp.FileSystemWriter(path)
        pending = []
        self.timed(
            "dcp_stall",
            lambda: pending.append(
                dcp.async_save(
                    self.state, storage_writer=storage, process_group=self.side
                )
            ),
        )
        pending[0].result()
        self.remove(path)

    def drop_first(self) -> None:
        """Forget the round that touched fresh memory."""
        for name in ("memcpy", "stall", "rest", "raw", "dcp"):
            self.times[f"first_{name}"] = self.times[name][:1]
            del self.times[name][0]

    def plans(self) -> None:
        """Measure agreement alone: the first of a layout, and later ones."""
        exchange = default_exchange()
        for number in range(self.rounds):
            agreement = Agreement(exchange)
            for name in ("plan_first", "plan_again"):
                writer = CheckpointWriter(self.base / f"plan-{number}", 0)
                self.timed(name, lambda a=agreement, w=writer: a.begin(w, self.state))
                if self.rank == 0:
                    writer.__exit__(None, None, None)

    def load(self) -> None:
        """Load another layout's save: ours, raw, and torch's of the same bytes."""
        ours = self.base / self.source
        theirs = self.base / self.source.replace("ours", "dcp")
        for number in range(self.rounds + 1):
            for how in ("cold", "warm"):
                for name, files, run in (
                    ("raw", ours, self.raw_read),
                    ("load", ours, lambda: load_into(ours, self.state)),
                    ("dcp", theirs, lambda: self.load_dcp(theirs)),
                ):
                    self.meet()
                    prepare(files, keep=how == "warm")
                    self.timed(f"{name}_{how}", run)
            if number == 0:
                self.times.clear()

    def load_dcp(self, path: Path) -> None:
        """Load with torch's own."""
        dcp.load(self.state, storage_reader=dcp.FileSystemReader(path))


def prepare(path: Path, *, keep: bool) -> None:
    """Put all files into the page cache, or out of it."""
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                while keep and opened.read(CALL_BYTES):
                    pass
                if not keep:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def work(plan: dict[str, object], rank: int, store: str) -> None:
    """Run one rank."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    world = int(str(plan["world"]))
    if world > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=300),
        )
    bench = Bench(plan, rank)
    getattr(bench, str(plan["do"]))()
    if rank == 0:
        print(json.dumps({"times": bench.times, "bytes": bench.size}), flush=True)
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Fork the ranks: torch is imported once."""
    plan = json.loads(sys.argv[1])
    store = f"{plan['base']}/store-{os.getpid()}"
    children = []
    for rank in range(plan["world"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(plan, rank, store)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    if failed:
        sys.exit("a rank failed")


if __name__ == "__main__":
    main()
