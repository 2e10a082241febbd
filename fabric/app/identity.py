"""The identity key on disk: created once, mode 0600, never overwritten."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fabric.core.errors import ConfigError
from fabric.core.signing import Ed25519Signer

SEED_BYTES = 32


def load_or_create_identity(path: Path) -> Ed25519Signer:
    """Return the identity in ``path``, creating it at the first start.

    Raises:
        ConfigError: the file is not a key, or others can read it.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        _create(path)
        return _load(path)


def _load(path: Path) -> Ed25519Signer:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        seed = file.read(SEED_BYTES + 1)
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:04o}: other users can read the identity key",
            next_step=f"chmod 600 {path}",
        )
    if len(seed) != SEED_BYTES:
        raise ConfigError(
            f"{path} is not an identity key ({len(seed)} B, not {SEED_BYTES})",
            next_step="restore it from a backup, or move it away to get a new identity",
        )
    return Ed25519Signer(seed)


def _create(path: Path) -> None:
    """Write a new key whole or not at all: temporary file, fsync, link."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    fd = os.open(temporary, flags, 0o600)
    try:
        os.write(fd, Ed25519Signer.generate().seed)
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(temporary, path)  # fails if another process was first: its key stands
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
