"""The root key of a mesh in a file of its own, sealed with a passphrase.

Only the command line opens it: to name owners and admins, and to give way to a new
root. A daemon never does.

    scrypt(passphrase, salt) -> key;  ChaCha20-Poly1305(key, nonce, seed, public part)

Source: RFC 7914 (scrypt), RFC 8439 (ChaCha20-Poly1305).
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from crdt_store.grants import Mesh, create_mesh
from fabric.app.control_messages import MeshInit
from fabric.core.errors import ConfigError
from fabric.core.ids import PeerId
from fabric.core.signing import Ed25519Signer

MAX_FILE_BYTES = 4096
SCRYPT_N = 1 << 17
"""128 MiB and about 0.4 s for each guess at a passphrase."""
_MAX_SCRYPT_N = 1 << 20
_SCRYPT_R = 8
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"  # nothing that looks like another
_GROUPS, _GROUP = 5, 5

Bytes = Annotated[bytes, msgspec.Meta(max_length=64)]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["fabric-root-1"]
    mesh: Mesh
    root: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    scrypt_n: Annotated[int, msgspec.Meta(ge=1 << 14, le=_MAX_SCRYPT_N)]
    salt: Bytes
    nonce: Annotated[bytes, msgspec.Meta(min_length=12, max_length=12)]
    sealed: Bytes

    def public_part(self) -> bytes:
        """Return what the cipher binds besides the seed."""
        return self.format.encode() + bytes.fromhex(self.mesh.id) + self.root


class RootKey(msgspec.Struct, frozen=True):
    """An opened root key.

    Attributes:
        mesh: The mesh, named by its *first* root.
        signer: The key.
    """

    mesh: Mesh
    signer: Ed25519Signer


def found_mesh(name: str, owner: str) -> tuple[MeshInit, RootKey]:
    """Return what a daemon is asked to found a mesh, and the new mesh's root key."""
    root = Ed25519Signer.generate()
    mesh, grant = create_mesh(name, root, PeerId(owner), time.time())
    return MeshInit(name, root.public_key, grant.raw), RootKey(mesh, root)


def new_passphrase() -> str:
    """Return a passphrase of 25 characters (123 bits)."""
    groups = (
        "".join(secrets.choice(_ALPHABET) for _ in range(_GROUP))
        for _ in range(_GROUPS)
    )
    return "-".join(groups)


def write_root_key(path: Path, key: RootKey, passphrase: str) -> None:
    """Write ``key`` to a new file at ``path``, mode 0600.

    Raises:
        ConfigError: the passphrase is empty, the file exists or cannot be written.
    """
    if not passphrase:
        raise ConfigError("the passphrase of a root key cannot be empty")
    bare = _Sealed(
        "fabric-root-1",
        key.mesh,
        key.signer.public_key,
        SCRYPT_N,
        secrets.token_bytes(16),
        secrets.token_bytes(12),
        b"",
    )
    box = ChaCha20Poly1305(_stretch(passphrase, bare))
    sealed = box.encrypt(bare.nonce, key.signer.seed, bare.public_part())
    content = msgspec.json.encode(msgspec.structs.replace(bare, sealed=sealed))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags, 0o600)
        try:
            os.write(fd, content + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists already", next_step="name another file with --root-file"
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"cannot write {path}: {exc.strerror}",
            next_step="name another file with --root-file",
        ) from exc


def read_root_key(path: Path, passphrase: str) -> RootKey:
    """Return the key in ``path``.

    Raises:
        ConfigError: no such file, damaged, or the passphrase is wrong.
    """
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(MAX_FILE_BYTES), type=_Sealed)
    except OSError as exc:
        raise ConfigError(
            f"cannot read {path}: {exc.strerror}",
            next_step="name the file that `fabric mesh init` wrote: --root-file",
        ) from exc
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path} is no root key: {exc}") from exc
    box = ChaCha20Poly1305(_stretch(passphrase, found))
    try:
        seed = box.decrypt(found.nonce, found.sealed, found.public_part())
        signer = Ed25519Signer(seed)
    except (InvalidTag, ValueError):
        raise ConfigError(
            f"{path} does not open: wrong passphrase, or the file was changed",
            code="E_PASSPHRASE",
            next_step="give the passphrase shown when the file was written",
        ) from None
    if signer.public_key != found.root:
        raise ConfigError(f"{path} holds another key than it says")
    return RootKey(found.mesh, signer)


def _stretch(passphrase: str, sealed: _Sealed) -> bytes:
    kdf = Scrypt(salt=sealed.salt, length=32, n=sealed.scrypt_n, r=_SCRYPT_R, p=1)
    return kdf.derive(passphrase.encode())
