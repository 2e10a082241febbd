"""The identity persists, is private, and is never overwritten."""

import threading

import pytest

from fabric.app.home import Home
from fabric.app.identity import load_or_create_identity
from fabric.core.errors import ConfigError


def test_persists_with_mode_0600(tmp_path):
    path = tmp_path / "identity.key"
    first = load_or_create_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_identity(path).peer_id == first.peer_id
    assert [p.name for p in tmp_path.iterdir()] == ["identity.key"]


def test_readable_by_others_is_refused(tmp_path):
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644") as caught:
        load_or_create_identity(path)
    assert "chmod 600" in caught.value.next_step


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_not_a_key(tmp_path, content):
    path = tmp_path / "identity.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not an identity key"):
        load_or_create_identity(path)


def test_two_starts_at_once_agree(tmp_path):
    path = tmp_path / "identity.key"
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(load_or_create_identity(path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({s.peer_id for s in seen}) == 1


def test_home_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FABRIC_HOME", str(tmp_path / "a"))
    home = Home.find()
    assert home.control_socket == tmp_path / "a" / "data" / "control.sock"
    assert Home.find(tmp_path / "b").data == tmp_path / "b" / "data"
    home.create()
    assert home.data.stat().st_mode & 0o777 == 0o700


def test_home_too_long_for_a_socket(tmp_path):
    with pytest.raises(ConfigError, match="Unix socket"):
        Home.find(tmp_path / ("x" * 100)).create()


def test_home_on_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot create"):
        Home.find(tmp_path / "file").create()
