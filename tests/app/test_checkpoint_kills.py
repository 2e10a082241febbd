"""The saving peer is killed at random moments: what has a head loads, always."""

import os
import random
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from checkpoints.boxes import Box
from checkpoints.parts import ChunkSource
from checkpoints.verification import verify_checkpoint
from checkpoints.writer import CheckpointWriter
from crdt_store.views import CheckpointHead
from dht.blobs import BlobStore
from dht.disk import write_durably
from fabric.app.checkpoint_flow import CheckpointFlow
from fabric.core.codec import Codec
from fabric.core.ids import JobId, PeerId
from fabric.jobs.spec import CheckpointSpec, JobSpec

pytestmark = pytest.mark.slow

KILLS = 5 * int(os.environ.get("SOAK_FACTOR", "1"))
JOB = JobId("ab" * 32)
SPEC = JobSpec(checkpoint=CheckpointSpec(keep=2))
SIZE = 6 << 20
HEADS = Codec(dict[str, CheckpointHead], max_bytes=1 << 20)


class Disk:
    """A peer of which only the disk survives; stands in for mesh and replication."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.blobs = BlobStore(folder / "content", 1 << 30)
        self.heads = self
        self.flow = CheckpointFlow(
            PeerId("me"), self, self.blobs, self, self, folder / "out"
        )

    # as Heads
    async def put(self, run, step, head):
        write_durably(
            self.folder / "heads", HEADS.encode({**self.all(), str(step): head})
        )

    def all(self):
        path = self.folder / "heads"
        return HEADS.decode_untrusted(path.read_bytes()) if path.exists() else {}

    # as ContentService and Replication
    async def provide(self, root):
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def publishing(self, run):
        yield

    def wake(self):
        pass

    def save(self, step):
        """Write a step as a worker does, then publish it as its daemon does."""
        data = random.Random(step).randbytes(SIZE)
        source = ChunkSource(
            "model/w", "U8", (SIZE,), Box((0,), (SIZE,)), lambda: [data]
        )
        directory = self.folder / "scratch" / f"step-{step}"
        with CheckpointWriter(directory, step) as writer:
            part = writer.write("worker", [source])
            writer.commit([part], state={"round": step})
        trio.run(self.flow.publish, JOB, SPEC, directory, step)


def saved_by_child(folder: Path, step: int, after: float | None) -> bool:
    """Save ``step`` in a process that is killed ``after`` seconds; whether it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Disk(folder).save(step)
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check(folder: Path, out: Path) -> int:
    """Check that every head's checkpoint is whole; return the newest step."""
    disk = Disk(folder)
    heads = disk.all()
    for name, head in heads.items():
        step = int(name)
        target = out / f"{step}.{time.monotonic_ns()}"
        disk.blobs.export(head.root, target)
        report = verify_checkpoint(target)
        assert report.ok, report.findings
        assert report.step == step
    assert not list((folder / "content" / "incoming").iterdir())
    return max(map(int, heads), default=0)


def test_killed_at_random_moments_the_newest_head_loads(tmp_path):
    began = time.monotonic()
    assert saved_by_child(tmp_path, 1, None)
    seconds = time.monotonic() - began
    rng = random.Random(int(os.environ.get("FABRIC_TEST_SEED", "11")))
    newest, announced = 1, 0
    for step in range(2, 2 + KILLS):
        ended = saved_by_child(tmp_path, step, rng.uniform(0, 1.1 * seconds))
        found = check(tmp_path, tmp_path / "out")
        assert found in ((step,) if ended else (newest, step))
        announced += found == step
        newest = found
    assert saved_by_child(tmp_path, 1000, None)
    assert check(tmp_path, tmp_path / "out") == 1000
