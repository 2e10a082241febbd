"""Which files of the library are text to train on."""

from training.worker.corpus import read_sources


def test_links_and_tests_are_left_out(tmp_path):
    root = tmp_path / "lib"
    root.mkdir()
    (root / "b.py").write_bytes(b"b")
    (root / "a.py").write_bytes(b"a")
    (root / "note.txt").write_bytes(b"x")
    (root / "test").mkdir()
    (root / "test" / "test_a.py").write_bytes(b"t")
    outside = tmp_path / "site.py"
    outside.write_bytes(b"outside")
    outside.chmod(0)
    (root / "sitecustomize.py").symlink_to(outside)
    assert read_sources(root) == b"ab"
