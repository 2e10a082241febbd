"""The file that holds a root key: sealed, private, and refused when it was touched."""

import json

import pytest

from fabric.app import root_key
from fabric.app.root_key import (
    RootKey,
    found_mesh,
    new_passphrase,
    read_root_key,
    write_root_key,
)
from fabric.core.errors import ConfigError
from fabric.core.signing import Ed25519Signer

OWNER = Ed25519Signer(bytes(31) + b"\x01").peer_id


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(root_key, "SCRYPT_N", 1 << 14)
    _, key = found_mesh("lab", OWNER)
    path = tmp_path / "root.json"
    write_root_key(path, key, "open sesame")
    return path, key


def test_the_key_comes_back_with_its_passphrase_only(sealed):
    path, key = sealed
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.signer.seed.hex() not in path.read_text()
    found = read_root_key(path, "open sesame")
    assert isinstance(found, RootKey)
    assert found.signer.seed == key.signer.seed
    assert found.mesh == key.mesh
    with pytest.raises(ConfigError) as caught:
        read_root_key(path, "open says me")
    assert caught.value.code == "E_PASSPHRASE"


def test_nothing_is_overwritten_and_nothing_is_sealed_with_nothing(sealed, tmp_path):
    path, key = sealed
    with pytest.raises(ConfigError, match="exists"):
        write_root_key(path, key, "x")
    with pytest.raises(ConfigError, match="empty"):
        write_root_key(tmp_path / "other", key, "")
    with pytest.raises(ConfigError, match="cannot write"):
        write_root_key(tmp_path / "none" / "other", key, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"scrypt_n": 1 << 30},
        {"scrypt_n": 3},
        {"nonce": "AAAA"},
        {"more": 1},
        {"format": "fabric-root-2"},
        {"mesh": {"name": "else", "root": "A" * 44}},
    ],
    ids=str,
)
def test_a_changed_file_is_refused(sealed, change):
    path, _ = sealed
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError):
        read_root_key(path, "open sesame")


def test_what_is_no_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_root_key(tmp_path / "none", "x")
    (tmp_path / "junk").write_bytes(b"\xff" * 5000)
    with pytest.raises(ConfigError, match="no root key"):
        read_root_key(tmp_path / "junk", "x")


def test_passphrases_differ():
    assert len({new_passphrase() for _ in range(20)}) == 20
    assert len(new_passphrase().replace("-", "")) == 25
