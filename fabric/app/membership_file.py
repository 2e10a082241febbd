"""Which mesh this peer belongs to, on disk: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from fabric.core.errors import ConfigError
from fabric.core.ids import MeshId

MAX_FILE_BYTES = 1 << 20
Entry = Annotated[bytes, msgspec.Meta(max_length=8192)]


class MeshMembership(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mesh and why we are in it.

    Attributes:
        mesh: Its id.
        name: Its name.
        root_public_key: 32 bytes; every grant leads back to it.
        bootstrap: Multiaddrs with ``/p2p/`` of members known when we joined.
        credentials: Raw signed entries that make us a member: a grant, or an invite's
            terms and our redemption.
    """

    mesh: MeshId
    name: str
    root_public_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    bootstrap: tuple[str, ...]
    credentials: tuple[Entry, ...]


def load_membership(path: Path) -> MeshMembership | None:
    """Return the membership in ``path``, or None if there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
        return msgspec.json.decode(raw, type=MeshMembership)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(
            f"{path} is damaged: {exc}",
            next_step="move it away and join again with a new invite",
        ) from exc


def save_membership(path: Path, membership: MeshMembership) -> None:
    """Write ``membership`` to ``path``: fsync, then rename."""
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, msgspec.json.encode(membership))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)


def forget_membership(path: Path) -> None:
    """Remove the membership, if any."""
    path.unlink(missing_ok=True)
