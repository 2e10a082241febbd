"""Peers are killed while they copy or remove checkpoints: nothing half stays."""

import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from crdt_store.views import CheckpointHead
from dht.blobs import BlobStore
from fabric.core.digest import BLOCK_BYTES
from tests.checkpoints.mesh.kill_peers import FileHeads, Process

pytestmark = pytest.mark.slow

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
KILLS = 2 * FACTOR
SIZE = 6 * BLOCK_BYTES + 5
NAMES = "abc"
COPIES = 2


class World:
    """Peers of which each may be killed; the test looks at their disks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers: dict[str, Process] = {}
        self.roots: dict[int, str] = {}
        self.heads = FileHeads(folder / "heads", "test")

    def start(self, names: str) -> None:
        for name in names:
            self.peers[name] = Process(self.folder, name, NAMES)

    def kill(self, name: str) -> None:
        self.peers.pop(name).kill()

    def publish(self, name: str, step: int, keep: int) -> None:
        """Save a step into the store of a peer that does not run, and announce it."""
        store = BlobStore(self.folder / name, 1 << 30)
        mark = partial(store.keeps.keep, owner="run")
        data = random.Random(step).randbytes(SIZE)
        self.roots[step] = root = store.add_bytes(data, f"step-{step}", mark=mark)
        head = CheckpointHead(
            root=root, bytes=SIZE, round=step, writer=name, copies=COPIES, keep=keep
        )
        self.heads.add("run", step, head)

    def announced(self) -> set[str]:
        return {head.root for head in self.heads.newest("run").values()}

    def names_in(self, peer: str, folder: str) -> set[str]:
        path = self.folder / peer / folder
        found = {each.name for each in path.iterdir()} if path.is_dir() else set()
        return {name for name in found if not name.endswith(".tmp")}

    def holders(self, root: str) -> set[str]:
        return {name for name in NAMES if root in self.names_in(name, "data")}

    def settled(self) -> bool:
        """Whether all heads have their copies and nothing else is anywhere."""
        wanted = self.announced()
        return all(len(self.holders(root)) == COPIES for root in wanted) and all(
            {each.partition(".")[0] for each in self.names_in(name, folder)} <= wanted
            for name in NAMES
            for folder in ("data", "parts", "manifests", "keeps")
        )

    def check_whole(self) -> None:
        """Whatever a peer offers is all there, right byte by byte."""
        contents = {
            root: random.Random(step).randbytes(SIZE)
            for step, root in self.roots.items()
        }
        for name in NAMES:
            for root in self.names_in(name, "data"):
                try:
                    found = (self.folder / name / "data" / root).read_bytes()
                except FileNotFoundError:
                    continue  # removed by a living peer meanwhile
                assert found == contents[root], f"{name} offers half of {root[:12]}"

    def until_settled(self) -> None:
        give_up = time.monotonic() + 60
        while not self.settled():
            assert time.monotonic() < give_up, self.told()
            time.sleep(0.01)
        self.check_whole()

    def told(self) -> str:
        folders = ("data", "parts", "manifests", "keeps")
        held = {n: {f: self.names_in(n, f) for f in folders} for n in NAMES}
        return f"steps {self.roots}, heads {self.announced()}, disks {held}"


@pytest.fixture
def world():
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        world = World(Path(folder))
        yield world
        for name in list(world.peers):
            world.kill(name)


@pytest.mark.parametrize("role", ["source", "target", "retiring"])
def test_killed_at_random_moments_copies_are_whole_and_nothing_is_left(world, role):
    rng = random.Random(f"{os.environ.get('FABRIC_TEST_SEED', '11')} {role}")
    keep = 1 if role == "retiring" else 2
    world.publish("a", 0, keep)
    world.start(NAMES)
    began = time.monotonic()
    world.until_settled()
    seconds = min(0.5, time.monotonic() - began)
    for step in range(1, 1 + KILLS):
        world.kill("a")
        world.publish("a", step, keep)
        world.start("a")
        victims = {"source": "a", "target": "bc", "retiring": NAMES}[role]
        time.sleep(rng.uniform(0, 1.2 * seconds))
        for name in victims:
            world.kill(name)
        world.check_whole()
        world.start(victims)
        world.until_settled()
