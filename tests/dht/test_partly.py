"""Some blocks of a blob: only those cross the network, and they stay for the rest."""

import random

import pytest
import trio

from dht.keeps import Keeps
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, ResourceExhausted, Unavailable
from fabric.core.ids import BlobId
from fabric.core.telemetry import RECEIVED_BYTES

FILES = {"a": 3 * BLOCK_BYTES + 17, "b": 5, "c": 6 * BLOCK_BYTES - 100, "empty": 0}
ROOT = BlobId("ab" * 32)


def content(name, size):
    return random.Random(name).randbytes(size)


@pytest.fixture
async def held(mesh, tmp_path):
    """A peer that holds a directory of three files, one that lacks it, and the root."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, size in FILES.items():
        (tree / name).write_bytes(content(name, size))
    seed, leech = await mesh.join("seed"), await mesh.join("leech")
    root = seed.blobs.add_directory(tree)
    return seed, leech, root


def received(peer):
    counts = peer.counters.snapshot()
    return sum(n for name, n in counts.items() if name.startswith(RECEIVED_BYTES))


async def test_only_the_blocks_of_the_ranges_arrive(held, tmp_path):
    seed, leech, root = held
    with trio.fail_after(10):
        async with leech.content.partly(root, [seed.own]) as part:
            assert await part.read_file("b", 100) == content("b", 5)
            assert received(leech) == BLOCK_BYTES
            entry = next(e for e in part.manifest.entries if e.path == "c")
            at = entry.offset + 2 * BLOCK_BYTES
            await part.need([(at, at + 10), (at, at)])
            await part.write_sparse(tmp_path / "out")
            assert part.needed_bytes == 2 * BLOCK_BYTES == received(leech)
    assert not leech.blobs.has(root)
    for name, size in FILES.items():
        assert (tmp_path / "out" / name).stat().st_size == size
    with (tmp_path / "out" / "c").open("rb") as file:
        file.seek(2 * BLOCK_BYTES)
        wanted = content("c", FILES["c"])[2 * BLOCK_BYTES :]
        assert file.read(10) == wanted[:10]


async def test_the_rest_comes_later_and_what_is_here_is_not_asked_again(held, tmp_path):
    seed, leech, root = held
    with trio.fail_after(10):
        async with leech.content.partly(root, [seed.own]) as part:
            await part.need([(0, 2 * BLOCK_BYTES)])
        assert leech.blobs.room.used() == 2 * BLOCK_BYTES
        await leech.content.fetch(root, [seed.own])
    assert received(leech) == sum(FILES.values())
    leech.blobs.export(root, tmp_path / "all")
    for name, size in FILES.items():
        assert (tmp_path / "all" / name).read_bytes() == content(name, size)


async def test_content_that_is_here_asks_nobody(held, tmp_path):
    seed, _, root = held
    with trio.fail_after(10):
        async with seed.content.partly(root) as part:
            await part.need([(0, part.manifest.size)])
            await part.write_sparse(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == content("a", FILES["a"])
    assert seed.dialled == []


async def test_refusals_leave_nothing(held):
    seed, leech, root = held
    leech.blobs.room.max_bytes = BLOCK_BYTES
    with trio.fail_after(10):
        with pytest.raises(ResourceExhausted):
            async with leech.content.partly(root, [seed.own]) as part:
                await part.need([(0, 2 * BLOCK_BYTES)])
        with pytest.raises(ConfigError, match="has no"):
            async with leech.content.partly(root, [seed.own]) as part:
                await part.read_file("nothing", 10)
        with pytest.raises(Unavailable):
            async with leech.content.partly(BlobId("00" * 32)):
                pass
    assert leech.blobs.ls() == []


def test_what_nobody_wants_goes_and_what_somebody_wants_stays(tmp_path):
    keeps = Keeps(tmp_path)
    keeps.keep(ROOT, "run-1")
    keeps.keep(ROOT, "run-2")
    assert keeps.kept() == {"run-1": {ROOT}, "run-2": {ROOT}}
    keeps.drop(ROOT, "run-1")
    assert keeps.owners(ROOT) == {"run-2"}
    assert keeps.wanted() == {ROOT}
    keeps.drop(ROOT, "run-2")
    assert keeps.wanted() == frozenset()
    with pytest.raises(ValueError, match="cannot own"):
        keeps.keep(ROOT, "../x")


async def test_a_kept_blob_is_not_removed(held):
    seed, _, root = held
    seed.blobs.keeps.keep(root, "run")
    assert not seed.blobs.remove(root)
    assert seed.blobs.gc() == []
    seed.blobs.keeps.drop(root, "run")
    assert seed.blobs.remove(root)
    assert seed.blobs.ls() == []
