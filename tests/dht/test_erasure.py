"""Any k pieces restore a blob, fewer do not, and damage is noticed."""

import itertools
import random

import pytest

from dht.blobs import BlobStore
from dht.erasure import check_code, make_pieces, restore
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, IntegrityError, ResourceExhausted

pytest.importorskip("zfec")


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "one", 1 << 30)


def blob(store, tmp_path, size):
    tree = tmp_path / f"tree{size}"
    tree.mkdir()
    rng = random.Random(size)
    (tree / "a").write_bytes(rng.randbytes(size))
    (tree / "b").write_bytes(rng.randbytes(100))
    return store.add_directory(tree)


def move(pieces, source, target, tmp_path):
    """Carry whole blobs from one store to another."""
    for piece in pieces:
        raw = source.manifest(piece)
        partial = target.open_partial(piece, raw)
        for index in range(raw.num_blocks):
            assert partial.write_block(index, source.read_block(piece, index))
        target.finish(partial)


@pytest.mark.parametrize("code", [(4, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize("size", [0, 5, 3 * BLOCK_BYTES + 17, 9 * BLOCK_BYTES])
def test_any_pieces_restore_it(store, tmp_path, code, size):
    data, extra = code
    root = blob(store, tmp_path, size)
    pieces = make_pieces(store, root, data, extra)
    assert len(set(pieces)) == data + extra
    assert make_pieces(store, root, data, extra) == pieces
    sizes = {store.manifest(piece).size for piece in pieces}
    stripes = -(-(1 + store.manifest(root).num_blocks) // data)
    assert sizes == {stripes * BLOCK_BYTES}
    every = list(itertools.combinations(range(data + extra), data))
    for number, chosen in enumerate(
        random.Random(size).sample(every, min(4, len(every)))
    ):
        other = BlobStore(tmp_path / f"other{number}", 1 << 30)
        move([pieces[at] for at in chosen], store, other, tmp_path)
        restore(other, root, pieces, data)
        assert other.raw_manifest(root) == store.raw_manifest(root)
        other.export(root, tmp_path / f"out{number}")
        for name in ("a", "b"):
            wanted = (tmp_path / f"tree{size}" / name).read_bytes()
            assert (tmp_path / f"out{number}" / name).read_bytes() == wanted


def test_too_few_or_foreign_pieces_are_refused(store, tmp_path):
    root, foreign = blob(store, tmp_path, 10), blob(store, tmp_path, 2 * BLOCK_BYTES)
    pieces = make_pieces(store, root, 2, 1)
    others = make_pieces(store, foreign, 2, 1)
    few = BlobStore(tmp_path / "few", 1 << 30)
    move(pieces[:1], store, few, tmp_path)
    with pytest.raises(IntegrityError, match="1 of 2 pieces"):
        restore(few, root, pieces, 2)
    move(others, store, few, tmp_path)
    with pytest.raises(IntegrityError):
        restore(few, root, others, 2)
    assert not few.has(root)


def test_a_damaged_piece_is_noticed(store, tmp_path):
    root = blob(store, tmp_path, 2 * BLOCK_BYTES)
    pieces = make_pieces(store, root, 2, 1)
    store.remove(root)
    path = tmp_path / "one" / "data" / pieces[0]
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.chmod(0o600)
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="damaged"):
        restore(store, root, pieces, 2)
    store.remove(pieces[0])
    restore(store, root, pieces, 2)
    assert store.has(root)


def test_what_cannot_be_is_refused_and_leaves_nothing(store, tmp_path):
    for data, extra in ((0, 2), (4, 0), (30, 4)):
        with pytest.raises(ConfigError, match="erasure"):
            check_code(data, extra)
    root = blob(store, tmp_path, 3 * BLOCK_BYTES)
    before = store.ls()
    store.room.max_bytes = store.room.used() + 2 * BLOCK_BYTES
    with pytest.raises(ResourceExhausted):
        make_pieces(store, root, 2, 2)
    assert store.ls() == before
    assert list((tmp_path / "one" / "incoming").iterdir()) == []
