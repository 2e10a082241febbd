"""The store on disk: round trips, crashes, full disks, hostile manifests."""

import errno
import os
import random
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import bitmap
from dht.blobs import BlobStore
from dht.manifest import (
    MAX_BLOCKS,
    MAX_MANIFEST_BYTES,
    BlobManifest,
    FileEntry,
    check_manifest,
    check_path,
    decode_manifest_untrusted,
    encode_manifest,
)
from fabric.core.digest import BLOCK_BYTES, block_digests
from fabric.core.errors import (
    ConfigError,
    IntegrityError,
    LocalProtocolError,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)

THREE = random.Random(1).randbytes(
    2 * BLOCK_BYTES + 4000
)  # 2 MiB + 4000 B: three blocks


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "store", 1 << 28)


def manifest_of(data, entries=(), name="x"):
    return BlobManifest(
        name=name,
        size=len(data),
        hashes=tuple(block_digests(data)),
        entries=tuple(FileEntry(*e) for e in entries),
    )


@pytest.mark.parametrize("data", [b"", b"x", b"y" * BLOCK_BYTES, THREE])
def test_bytes_round_trip(store, tmp_path, data):
    root = store.add_bytes(data, "name")
    manifest = store.manifest(root)
    assert manifest.size == len(data)
    assert store.has(root)
    assert (
        b"".join(store.read_block(root, i) for i in range(manifest.num_blocks)) == data
    )
    assert store.have_bitmap(root) == bitmap.full(manifest.num_blocks)
    store.export(root, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert store.add_bytes(data, "name") == root
    assert [s.root for s in store.ls()] == [root]


def test_a_directory_round_trips_with_files_across_block_borders(store, tmp_path):
    source = tmp_path / "step-7"
    files = {
        "manifest.json": b"{}",
        "a/weights.safetensors": THREE,
        "a/b/empty": b"",
        "z": b"z" * (BLOCK_BYTES - 1),
    }
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    root = store.add_directory(source, {"kind": "checkpoint"})
    manifest = store.manifest(root)
    assert [e.path for e in manifest.entries] == sorted(files)
    assert manifest.meta == {"kind": "checkpoint"}
    store.export(root, tmp_path / "deep" / "restored")
    restored = tmp_path / "deep" / "restored"
    found = {
        p.relative_to(restored).as_posix(): p.read_bytes()
        for p in restored.rglob("*")
        if p.is_file()
    }
    assert found == files
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["restored"]
    with pytest.raises(ConfigError, match="exists"):
        store.export(root, restored)


def test_links_and_empty_directories_are_refused(store, tmp_path):
    source = tmp_path / "d"
    source.mkdir()
    with pytest.raises(ConfigError, match="no files"):
        store.add_directory(source)
    (source / "link").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="neither a file"):
        store.add_directory(source)
    with pytest.raises(ConfigError):
        store.add_file(source)
    assert store.room.used() == 0


def test_damage_on_disk_is_found(store, tmp_path):
    root = store.add_bytes(THREE)
    path = tmp_path / "store" / "data" / root
    raw = bytearray(path.read_bytes())
    raw[BLOCK_BYTES + 5] ^= 1
    path.write_bytes(raw)
    assert store.read_block(root, 0) == THREE[:BLOCK_BYTES]
    with pytest.raises(IntegrityError):
        store.read_block(root, 1)
    with pytest.raises(IntegrityError):
        store.export(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_partial_resumes_with_what_survived(store, tmp_path):
    manifest = manifest_of(THREE)
    root, _ = encode_manifest(manifest)
    partial = store.open_partial(root, manifest)
    assert partial.write_block(2, THREE[2 * BLOCK_BYTES :])
    assert partial.write_block(0, THREE[:BLOCK_BYTES])
    assert not partial.write_block(1, THREE[:BLOCK_BYTES])
    assert partial.have == 0b101 == store.have_bitmap(root)
    with pytest.raises(LocalProtocolError):
        store.open_partial(root, manifest)
    with pytest.raises(LocalProtocolError):
        store.finish(partial)
    assert not store.has(root)
    store.release(partial)
    assert partial.write_block(1, THREE[BLOCK_BYTES : 2 * BLOCK_BYTES])
    assert partial.have == 0b101, "a late block after close is dropped"

    reopened = BlobStore(tmp_path / "store", 1 << 28)
    partial = reopened.open_partial(root, manifest)
    assert partial.have == 0b101
    buffer = bytearray(BLOCK_BYTES)
    assert partial.read_into(1, memoryview(buffer)) == 0
    assert partial.read_into(2, memoryview(buffer)) == 4000
    assert partial.write_block(1, THREE[BLOCK_BYTES : 2 * BLOCK_BYTES])
    reopened.finish(partial)
    assert reopened.has(root)
    assert reopened.read_block(root, 1) == THREE[BLOCK_BYTES : 2 * BLOCK_BYTES]
    assert list((tmp_path / "store" / "parts").iterdir()) == []


KILLED = """
import os, random, signal, sys
from pathlib import Path
from dht.blobs import BlobStore
from dht.manifest import BlobManifest
from fabric.core.digest import block_digests
data = random.Random(1).randbytes((2 << 20) + 4000)
m = BlobManifest(name="x", size=len(data), hashes=tuple(block_digests(data)))
s = BlobStore(Path(sys.argv[1]), 1 << 28)
p = s.open_partial(sys.argv[2], m)
p.write_block(1, data[1 << 20 : 2 << 20])
os.pwrite(p._fd, b"torn", 0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_kill_9_loses_only_the_torn_block(tmp_path):
    manifest = manifest_of(THREE)
    root, _ = encode_manifest(manifest)
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "s"), root], timeout=60
    ).returncode
    assert code == -9
    store = BlobStore(tmp_path / "s", 1 << 28)
    assert not store.has(root)
    partial = store.open_partial(root, manifest)
    assert partial.have == 0b010
    store.release(partial)


def test_the_stores_own_bound_is_refused_before_anything_is_written(tmp_path):
    store = BlobStore(tmp_path / "s", 2 << 20)
    with pytest.raises(ResourceExhausted) as refused:
        store.add_bytes(THREE)
    assert "content.max_bytes" in refused.value.next_step
    root, _ = encode_manifest(manifest_of(THREE))
    with pytest.raises(ResourceExhausted):
        store.open_partial(root, manifest_of(THREE))
    assert store.room.used() == 0
    assert store.ls() == []
    store.add_bytes(b"small")


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_nothing_behind(store, tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr("dht.ingest.os.fsync", full)
    else:
        monkeypatch.setattr("dht.ingest.BlockWriter._flush", full)
    with pytest.raises(ResourceExhausted) as refused:
        store.add_bytes(THREE)
    assert refused.value.code == "E_DISK_FULL"
    assert refused.value.next_step
    monkeypatch.undo()
    files = [p for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert files == []
    assert store.room.used() == 0


def test_a_full_disk_while_receiving_keeps_the_verified_blocks(store, monkeypatch):
    manifest = manifest_of(THREE)
    root, _ = encode_manifest(manifest)
    partial = store.open_partial(root, manifest)
    partial.write_block(0, THREE[:BLOCK_BYTES])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dht.partial.os.pwrite", full)
    with pytest.raises(ResourceExhausted):
        partial.write_block(1, THREE[BLOCK_BYTES : 2 * BLOCK_BYTES])
    assert partial.have == 0b001
    store.release(partial)


def test_gc_spares_pins_and_open_parts_and_takes_the_oldest_first(store, tmp_path):
    roots = [store.add_bytes(bytes([n]) * 1000) for n in range(4)]
    for age, root in enumerate(roots):
        os.utime(tmp_path / "store" / "data" / root, (age, age))
    with store.open_reader(roots[0]):
        pass  # used: now the youngest
    store.pin(roots[1])
    manifest = manifest_of(THREE)
    partial = store.open_partial(encode_manifest(manifest)[0], manifest)
    keep = len(THREE) + 3000
    assert store.gc(keep) == [roots[2]]
    assert store.gc() == [roots[3], roots[0]]
    assert store.has(roots[1])
    assert store.stat(roots[1]).pinned
    store.release(partial)
    store.unpin(roots[1])
    assert set(store.gc()) == {roots[1], partial.root}
    assert store.room.used() == 0
    assert store.ls() == []
    with pytest.raises(Unavailable) as missing:
        store.pin(roots[1])
    assert "content get" in missing.value.next_step


def test_leftovers_of_a_crash_are_removed_at_start(store, tmp_path):
    (tmp_path / "store" / "incoming" / "half").write_bytes(b"x")
    (tmp_path / "store" / "manifests" / ("0" * 64)).write_bytes(b"x")
    root = store.add_bytes(b"kept")
    again = BlobStore(tmp_path / "store", 1 << 20)
    assert [s.root for s in again.ls()] == [root]
    assert list((tmp_path / "store" / "incoming").iterdir()) == []


@pytest.mark.parametrize("root", ["../../etc/passwd", "", "A" * 64, "0" * 63 + "/"])
def test_a_root_is_never_a_path(store, root):
    with pytest.raises(ValueError, match="not a content root"):
        store.has(root)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../up",
        "a/../../b",
        "a//b",
        "./a",
        "a/.",
        "a\\b",
        "c:evil",
        "a\0b",
        "a\nb",
        "n" * 256,
        "a\u202eb",
        "\ud800",
        "/",
        "..",
    ],
)
def test_unsafe_paths_are_refused(path):
    with pytest.raises(RemoteProtocolError):
        check_path(path)


@pytest.mark.parametrize(
    "manifest",
    [
        manifest_of(b"abc", [("a", 0, 2)]),
        manifest_of(b"abc", [("a", 0, 2), ("b", 1, 2)]),
        manifest_of(b"abc", [("a", 1, 2)]),
        manifest_of(b"abc", [("a", 0, 1), ("a", 1, 2)]),
        manifest_of(b"abc", [("a", 0, 1), ("a/b", 1, 2)]),
        manifest_of(b"abc", [("../a", 0, 3)]),
        BlobManifest(name="", size=5, hashes=()),
        BlobManifest(name="", size=0, hashes=(b"h" * 32,)),
        BlobManifest(name="", size=5, hashes=(b"h" * 32,), block=4096),
    ],
)
def test_manifests_that_do_not_tile_are_refused_whatever_their_root(store, manifest):
    root, raw = encode_manifest(manifest)
    with pytest.raises(RemoteProtocolError):
        decode_manifest_untrusted(raw, root)


def test_bounds_of_a_manifest():
    biggest = BlobManifest(
        name="x", size=MAX_BLOCKS * BLOCK_BYTES, hashes=(b"h" * 32,) * MAX_BLOCKS
    )
    root, raw = encode_manifest(biggest)
    assert len(raw) < MAX_MANIFEST_BYTES
    assert decode_manifest_untrusted(raw, root) == biggest
    with pytest.raises(ResourceExhausted):
        encode_manifest(
            BlobManifest(name="x", size=0, hashes=(b"h" * 32,) * (MAX_BLOCKS + 1))
        )
    with pytest.raises(RemoteProtocolError, match="B >"):
        decode_manifest_untrusted(b"\0" * (MAX_MANIFEST_BYTES + 1), root)
    with pytest.raises(IntegrityError):
        decode_manifest_untrusted(raw, "0" * 64)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_a_protocol_error(raw):
    from fabric.core.digest import hex_digest

    with suppress(RemoteProtocolError):
        check_manifest(decode_manifest_untrusted(raw, hex_digest(raw)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.data())
def test_bitmaps_round_trip_and_refuse_foreign_bits(n, data):
    bits = data.draw(st.integers(0, bitmap.full(n)))
    assert bitmap.decode_untrusted(bitmap.encode(bits, n), n) == bits
    assert sum(1 << b for b in bitmap.members(bits)) == bits
    start = data.draw(st.integers(0, n))
    found = bitmap.first_from(bits, start)
    later = [b for b in bitmap.members(bits) if b >= start]
    assert found == (min(later) if later else min(bitmap.members(bits), default=None))
    raw = data.draw(st.binary(max_size=30))
    with suppress(RemoteProtocolError):
        assert bitmap.decode_untrusted(raw, n) <= bitmap.full(n)


def test_what_is_marked_or_held_is_never_collected(store, monkeypatch):
    publish, mark = store._publish, partial(store.keeps.keep, owner="run")

    def collected(work, root):
        """Collect at the very moment at which new content can be seen."""
        publish(work, root)
        store.gc()

    monkeypatch.setattr(store, "_publish", collected)
    gone = store.add_bytes(b"nobody wants it")
    assert not store.has(gone)
    wanted = store.add_bytes(b"somebody does", mark=mark)
    assert store.has(wanted)
    with store.keeps.held(wanted), store.keeps.held(wanted):
        assert not store.remove(wanted, "run")
        assert store.gc() == []
    assert store.keeps.kept() == {}
    assert store.gc() == [wanted]


def test_what_is_received_keeps_its_mark(store, tmp_path):
    root = BlobStore(tmp_path / "other", 1 << 30).add_bytes(THREE)
    manifest = BlobStore(tmp_path / "other", 1 << 30).manifest(root)
    store.keeps.keep(root, "run")
    part = store.open_partial(root, manifest)
    assert not store.remove(root, "run")
    assert store.keeps.owners(root) == {"run"}
    store.release(part)
    assert store.remove(root, "run")
    assert store.keeps.kept() == {}
    assert not store.ls()


def test_content_that_goes_while_it_is_listed_is_left_out(store, monkeypatch):
    first, second = store.add_bytes(b"1"), store.add_bytes(b"2")
    stat = store.stat

    def gone(root):
        store.remove(min(first, second))
        return stat(root)

    monkeypatch.setattr(store, "stat", gone)
    assert [each.root for each in store.ls()] == [max(first, second)]
