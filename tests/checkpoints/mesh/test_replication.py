"""Replication between stores on disk: copies, removal, damage, full disks, pieces."""

import random
from collections import defaultdict
from functools import partial

import pytest
import trio
import trio.testing

from checkpoints.mesh.config import ReplicationConfig
from checkpoints.mesh.erasure_service import Erasure
from checkpoints.mesh.placement import Domain
from checkpoints.mesh.replicas import Want
from checkpoints.mesh.replication_service import Replication, ReplicationPorts
from crdt_store.views import CheckpointHead, Heads
from dht.blobs import BlobStore
from dht.download_service import BAD_BLOCKS
from dht.erasure import make_pieces
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ResourceExhausted
from fabric.core.ids import PeerId
from tests.dht.conftest import Mesh

pytestmark = pytest.mark.slow

QUICK = ReplicationConfig(
    period_seconds=0.05,
    lost_after_seconds=1.5,
    retry_seconds=60,
    call_timeout_seconds=2,
)


class SharedHeads(Heads):
    """Heads that every peer sees at once."""

    def __init__(self, table, peer):
        self._table, self._me = table, peer
        self._changed = trio.Event()
        table[""].append(self)

    def runs(self):
        return sorted(run for run in self._table if run)

    def all(self, run):
        return dict(self._table[run]) if run in self._table else {}

    async def put(self, run, step, head):
        if run not in self._table:
            self._table[run] = {}
        self._table[run][step] = head
        for heads in self._table[""]:
            heads._changed.set()

    def watch(self):
        return self

    async def changed(self):
        await self._changed.wait()
        self._changed = trio.Event()


class World:
    """Peers with content and replication; each on a host of its own."""

    def __init__(self, directory, nursery):
        self.nursery = nursery
        self.mesh = Mesh(directory, nursery)
        self.heads = defaultdict(list)
        self.services, self.scopes, self.in_use = {}, {}, set()

    def domains(self):
        return {p: Domain(f"site {p}", f"host {p}") for p in self.mesh.peers}

    async def join(self, name):
        peer = await self.mesh.join(name)
        self.start(peer)
        return peer

    def start(self, peer):
        ports = ReplicationPorts(
            peer,
            SharedHeads(self.heads, peer.own),
            peer.blobs,
            peer.content,
            self.domains,
            lambda: self.in_use,
        )
        service = Replication(QUICK, peer.own, ports, peer.counters)
        self.services[peer.own] = service
        scope = self.scopes[peer.own] = trio.CancelScope()

        async def run():
            with scope:
                await service.run()

        self.nursery.start_soon(run)

    def leave(self, peer):
        self.scopes[peer.own].cancel()
        del self.mesh.peers[peer.own]

    async def publish(self, peer, step, *, size=3 * BLOCK_BYTES + 5, **head):
        data = random.Random(step).randbytes(size)
        service = self.services[peer.own]
        async with service.publishing("run"):
            mark = partial(peer.blobs.keeps.keep, owner="run")
            root = peer.blobs.add_bytes(data, f"step-{step}", mark=mark)
            head = CheckpointHead(
                root=root, bytes=size, round=step, writer=peer.own, **head
            )
            await service._ports.heads.put("run", step, head)
        return root

    def holders(self, root):
        return {p for p, peer in self.mesh.peers.items() if peer.blobs.has(root)}

    async def until(self, condition, seconds=60):
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 - any condition
                await trio.sleep(0.02)


@pytest.fixture
async def world(tmp_path):
    async with trio.open_nursery() as nursery:
        world = World(tmp_path, nursery)
        yield world
        world.mesh.close()
        nursery.cancel_scope.cancel()


async def test_copies_are_made_kept_to_the_newest_steps_and_shown(world):
    a, b, c = [await world.join(name) for name in "abc"]
    first = await world.publish(a, 1, keep=2)
    await world.until(lambda: len(world.holders(first)) == 2)
    person = next(p for p in (a, b, c) if p.own in world.holders(first))
    person.blobs.pin(first)
    second = await world.publish(b, 2, keep=2)
    third = await world.publish(c, 3, keep=2)
    await world.until(lambda: all(len(world.holders(r)) == 2 for r in (second, third)))
    await world.until(lambda: world.holders(first) == {person.own})
    shown = world.services[a.own].copies()
    await world.until(lambda: set(world.services[a.own].copies().values()) == {(2, 2)})
    assert first not in shown or shown[first]
    person.blobs.unpin(first)
    # its mark goes with a look of its own, which may come after the others'
    await world.until(lambda: person.blobs.remove(first))


async def test_a_step_in_use_stays_until_it_is_not(world):
    a, b = [await world.join(name) for name in "ab"]
    first = await world.publish(a, 1, keep=1)
    await world.until(lambda: len(world.holders(first)) == 2)
    world.in_use.add(first)
    second = await world.publish(b, 2, keep=1)
    await world.until(lambda: len(world.holders(second)) == 2)
    await trio.sleep(5 * QUICK.period_seconds)
    assert len(world.holders(first)) == 2
    world.in_use.clear()
    await world.until(lambda: not world.holders(first))


async def test_a_lost_holder_is_replaced_and_the_one_too_many_goes(world):
    peers = {p.own: p for p in [await world.join(name) for name in "abcd"]}
    root = await world.publish(peers["a"], 1)
    await world.until(lambda: len(world.holders(root)) == 2)
    (other,) = world.holders(root) - {"a"}
    lost = peers.pop(other)
    world.leave(lost)
    await world.until(lambda: len(world.holders(root)) == 2)
    world.mesh.peers[lost.own] = lost
    world.start(lost)
    assert len(world.holders(root)) == 3
    await world.until(lambda: len(world.holders(root)) == 2)


async def test_flipped_bytes_are_caught_and_another_holder_is_used(world):
    a, b = [await world.join(name) for name in "ab"]
    root = await world.publish(a, 1, copies=2)
    await world.until(lambda: len(world.holders(root)) == 2)
    path = world.mesh.directory / "a" / "data" / root
    path.chmod(0o600)
    with path.open("r+b") as file:
        for block in range(4):
            file.seek(block * BLOCK_BYTES)
            file.write(b"\xff\x00\xff")
    world.leave(b)  # so that the newcomer asks the other one
    third = await world.join("c")
    await world.services[a.own]._ports.heads.put(
        "run", 1, CheckpointHead(root=root, bytes=3, round=1, writer="a", copies=3)
    )

    def bad_blocks():
        counts = third.counters.snapshot()
        return sum(n for name, n in counts.items() if name.startswith(BAD_BLOCKS))

    await world.until(lambda: bad_blocks() > 0)
    assert not third.blobs.has(root)
    world.mesh.peers[b.own] = b
    world.start(b)
    await world.until(lambda: third.blobs.has(root))
    assert third.blobs.read_block(root, 1) == b.blobs.read_block(root, 1)


async def test_a_full_disk_is_passed_over_with_its_reason(world, caplog):
    a, b, c, d = [await world.join(name) for name in "abcd"]

    def full(root, manifest, wanted=None):
        raise ResourceExhausted("no space left", code="E_DISK_FULL")

    for peer in (b, c):
        peer.blobs.open_partial = full
    root = await world.publish(a, 1)
    await world.until(lambda: d.blobs.has(root))
    assert world.holders(root) == {"a", "d"}
    tried = [r for r in caplog.messages if r.startswith("replication.refused")]
    assert all("no space left" in line for line in tried)
    small = await world.join("e")
    small.blobs.room.max_bytes = BLOCK_BYTES
    world.leave(d)
    big = await world.join("f")
    await world.until(lambda: big.blobs.has(root))
    assert not small.blobs.has(root)


async def test_a_step_published_in_the_middle_of_a_look_stays(world, monkeypatch):
    a, _ = [await world.join(name) for name in "ab"]
    first = await world.publish(a, 1, keep=2)
    await world.until(lambda: len(world.holders(first)) == 2)
    token, published, wanted = trio.lowlevel.current_trio_token(), [], a.blobs.keeps
    marks = wanted.kept

    async def publish():
        published.append(await world.publish(a, 2, keep=2))

    def kept():
        """Publish a step after the look at its heads and before that at its marks."""
        if not published:
            trio.from_thread.run(publish, trio_token=token)
        return marks()

    monkeypatch.setattr(wanted, "kept", kept)
    await world.until(lambda: published and len(world.holders(published[0])) == 2)
    assert a.blobs.has(published[0])


async def test_a_step_published_again_while_it_is_removed_stays(world, monkeypatch):
    a = await world.join("a")
    root = await world.publish(a, 1, keep=1)
    token, begun, done = trio.lowlevel.current_trio_token(), [], trio.Event()
    remove = a.blobs.remove

    async def publish_again():
        async with world.services[a.own].publishing("run"):
            mark = partial(a.blobs.keeps.keep, owner="run")
            size = 3 * BLOCK_BYTES + 5
            again = a.blobs.add_bytes(
                random.Random(1).randbytes(size), "step-1", mark=mark
            )
            head = CheckpointHead(root=again, bytes=size, round=3, writer=a.own, keep=1)
            await world.services[a.own]._ports.heads.put("run", 3, head)
        done.set()

    async def meanwhile():
        begun.append(root)
        world.nursery.start_soon(publish_again)
        await trio.testing.wait_all_tasks_blocked(0.05)

    def slow_remove(which, owner=""):
        """Remove after the same bytes were begun to be published as a later step."""
        if which == root and not begun:
            trio.from_thread.run(meanwhile, trio_token=token)
        return remove(which, owner)

    monkeypatch.setattr(a.blobs, "remove", slow_remove)
    await world.publish(a, 2, keep=1)
    with trio.fail_after(20):
        await done.wait()
    await trio.sleep(4 * QUICK.period_seconds)
    assert begun
    assert a.blobs.has(root)


async def test_remade_pieces_do_not_push_out_those_that_were_here(tmp_path):
    pytest.importorskip("zfec")
    blobs = BlobStore(tmp_path, 1 << 30)
    data = random.Random(1).randbytes(3 * BLOCK_BYTES)
    root = blobs.add_bytes(data, mark=partial(blobs.keeps.keep, owner="run"))
    pieces = make_pieces(blobs, root, 2, 2, partial(blobs.keeps.keep, owner="run"))
    for piece in (pieces[0], *pieces[2:]):
        assert blobs.remove(piece, "run")
    want = Want(root, "run", 1, len(data), 2, pieces=pieces, needed=2)
    erasure = Erasure(PeerId("a"), None, blobs, None, 1)
    await erasure.remake(want, frozenset(pieces[:1]))
    assert [blobs.has(piece) for piece in pieces] == [True, True, False, False]
    assert blobs.keeps.kept() == {"run": {root, *pieces[:2]}}


async def test_what_a_crash_left_without_a_head_goes(world):
    a = await world.join("a")
    orphan = a.blobs.add_bytes(b"half a story", "step-1")
    a.blobs.keeps.keep(orphan, "run")
    await trio.sleep(4 * QUICK.period_seconds)
    assert a.blobs.has(orphan), "no head of the run is known: nothing is judged"
    async with world.services[a.own].publishing("run"):
        root = await world.publish(a, 2)
        await trio.sleep(4 * QUICK.period_seconds)
        assert a.blobs.has(orphan), "it may be about to get a head"
    await world.until(lambda: not a.blobs.has(orphan))
    assert a.blobs.has(root)


async def test_pieces_replace_whole_copies_and_restore_a_lost_one(world):
    pytest.importorskip("zfec")
    peers = {p.own: p for p in [await world.join(name) for name in "abcd"]}
    root = await world.publish(peers["a"], 1, copies=2, erasure="2+2")

    def head():
        return world.heads["run"][1]

    def spread_out():
        loads = [
            sum(peer.blobs.has(piece) for piece in head().pieces)
            for peer in world.mesh.peers.values()
        ]
        return sorted(loads) == [1, 1, 1, 1] and len(world.holders(root)) == 1

    await world.until(lambda: len(head().pieces) == 4)
    await world.until(spread_out)
    (whole,) = world.holders(root)
    wanted = peers[whole].blobs.read_block(root, 2)
    world.leave(peers.pop(whole))
    await world.until(lambda: len(world.holders(root)) == 1)
    (again,) = world.holders(root)
    assert peers[again].blobs.read_block(root, 2) == wanted
    await world.until(lambda: all(world.holders(p) for p in head().pieces))
