"""The folder in memory: one per home, and none for homes that are gone."""

import shutil

import pytest

from fabric.app import checkpoints
from fabric.app.checkpoints import claim_hot_folder, hot_folder
from fabric.app.home import Home


@pytest.fixture
def memory(tmp_path, monkeypatch):
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(checkpoints, "SHARED_MEMORY", folder)
    return folder


def home_of(path):
    home = Home.find(path)
    home.create()
    return home


def test_what_a_deleted_home_left_goes_with_the_next_start(memory, tmp_path):
    one, other = home_of(tmp_path / "one"), home_of(tmp_path / "other")
    folders = [hot_folder(home) for home in (one, other)]
    assert len(set(folders)) == 2
    for home, folder in zip((one, other), folders, strict=True):
        folder.mkdir()
        (folder / "state").write_bytes(b"x")
        claim_hot_folder(home, folder)
    assert all(folder.exists() for folder in folders)
    shutil.rmtree(tmp_path / "one")
    claim_hot_folder(other, folders[1])
    assert not folders[0].exists()
    assert (folders[1] / "state").exists()
    assert len(list(memory.iterdir())) == 2


def test_without_shared_memory_it_lies_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARED_MEMORY", tmp_path / "none")
    home = home_of(tmp_path / "one")
    assert hot_folder(home) == home.state / "hot"
    claim_hot_folder(home, hot_folder(home))
