"""Some tensors of a checkpoint: the bytes they need, and a checkpoint of them."""

import shutil

import pytest

from checkpoints.manifest import MANIFEST_NAME
from checkpoints.mesh.selection import needed_ranges, select_names
from checkpoints.mesh.subset import write_subset
from checkpoints.reader import CheckpointReader
from checkpoints.verification import verify_checkpoint
from dht.blobs import BlobStore
from dht.part_service import blocks_bytes, blocks_of
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, IntegrityError


@pytest.fixture
def step(tmp_path, lab):
    """A step of 2 MiB with rows over two files, an alias, an empty and a scalar."""
    lab.save(tmp_path / "steps")
    return tmp_path / "steps" / "step-1"


def sparse_copy(step, target, manifest, names, tmp_path):
    """Return how many bytes of the step the tensors need; lay out just these."""
    store = BlobStore(tmp_path / "store", 1 << 30)
    blob = store.manifest(store.add_directory(step))
    ranges = needed_ranges(manifest, names, blob)
    places = {entry.path: entry for entry in blob.entries}
    target.mkdir()
    for name, entry in places.items():
        data = bytearray(entry.size)
        raw = (step / name).read_bytes()
        for begin, end in ranges:
            first = max(begin, entry.offset) - entry.offset
            last = min(end, entry.offset + entry.size) - entry.offset
            data[first:last] = raw[first:last]
        (target / name).write_bytes(data)
    return blocks_bytes(blob, blocks_of(ranges)), blob.size


def test_names_are_chosen_by_patterns(step):
    with CheckpointReader(step) as reader:
        manifest, names = reader.manifest, reader.names()
    assert select_names(manifest, ["*"]) == names
    assert select_names(manifest, ["model/*"]) == [
        name for name in names if name.startswith("model/")
    ]
    assert select_names(manifest, [names[0], names[0]]) == [names[0]]
    with pytest.raises(ConfigError, match="no tensor matches") as refusal:
        select_names(manifest, ["model/*", "nothing*"])
    assert names[0] in refusal.value.next_step


def test_each_tensor_alone_becomes_a_checkpoint_of_its_own(step, tmp_path):
    with CheckpointReader(step) as whole:
        names = whole.names()
        for number, name in enumerate(names):
            part, out = tmp_path / f"part{number}", tmp_path / f"out{number}"
            needed, total = sparse_copy(step, part, whole.manifest, [name], tmp_path)
            assert needed <= total
            root = write_subset(part, [name], out, [name])
            report = verify_checkpoint(out, root=root)
            assert report.ok, report.findings
            with CheckpointReader(out, root=root) as reader:
                assert reader.names() == [name]
                assert reader.read_tensor(name) == whole.read_tensor(name)
                assert reader.manifest.parent == whole.root
                assert reader.state == whole.state
                assert reader.manifest.layout["subset"]["of"] == whole.root


def test_all_of_it_is_the_same_tensors_and_aliases(step, tmp_path):
    with CheckpointReader(step) as whole:
        root = write_subset(step, whole.names(), tmp_path / "out", ["*"])
        with CheckpointReader(tmp_path / "out", root=root) as reader:
            assert reader.names() == whole.names()
            assert reader.aliases == whole.aliases
            for name in whole.names():
                assert reader.read_tensor(name) == whole.read_tensor(name)


def test_a_hole_where_bytes_are_needed_is_caught_and_leaves_nothing(step, tmp_path):
    with CheckpointReader(step) as whole:
        name = max(whole.manifest.tensors, key=lambda n: len(whole.read_tensor(n)))
        file = whole.manifest.tensors[name].chunks[0].file
    shutil.copytree(step, tmp_path / "part")
    path = tmp_path / "part" / file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(IntegrityError):
        write_subset(tmp_path / "part", [name], tmp_path / "out", [name])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".fabric-fetch-*"))
    with pytest.raises(ConfigError, match="exists"):
        write_subset(step, [name], step, [name])


def test_content_that_lacks_a_file_is_no_checkpoint(step, tmp_path):
    with CheckpointReader(step) as whole:
        manifest, names = whole.manifest, whole.names()
    store = BlobStore(tmp_path / "store", 1 << 30)
    (tmp_path / "bare").mkdir()
    shutil.copy(step / MANIFEST_NAME, tmp_path / "bare")
    blob = store.manifest(store.add_directory(tmp_path / "bare"))
    with pytest.raises(IntegrityError, match="no whole checkpoint"):
        needed_ranges(manifest, names, blob)
    assert blob.size < BLOCK_BYTES
