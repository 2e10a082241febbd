"""Which mesh this peer belongs to, on disk: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from crdt_store.grants import Mesh
from fabric.core.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
Entry = Annotated[bytes, msgspec.Meta(max_length=8192)]


class MeshMembership(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mesh and why we are in it.

    Attributes:
        mesh: Its name and root public key; every grant leads back to it.
        bootstrap: Multiaddrs with ``/p2p/`` of members known when we joined.
        credentials: Raw signed entries that make us a member: a grant, or our
            redemption of an invite.
    """

    mesh: Mesh
    bootstrap: tuple[str, ...]
    credentials: tuple[Entry, ...]


def load_membership(path: Path) -> MeshMembership | None:
    """Return the membership in ``path``, or None if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=MeshMembership)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(
            f"{path} is damaged: {exc}",
            next_step="move it away and join again with a new invite",
        ) from exc


def save_private(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` with mode 0600: fsync, then rename."""
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)


def save_membership(path: Path, membership: MeshMembership) -> None:
    """Write ``membership`` to ``path``."""
    save_private(path, msgspec.json.encode(membership))


def forget_membership(path: Path) -> None:
    """Remove the membership, if any."""
    path.unlink(missing_ok=True)
