"""Invite tokens: one string that lets its holder join.

    fabric1-<base64url of msgpack [Invite] || 4 B of its BLAKE3>

The token holds the private seed of the one-off key K, so whoever reads it can join:
its ``repr`` never shows it, and it is never logged.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated

import msgspec
from typing_extensions import override

from crdt_store.clock import stamp
from crdt_store.entry import Entry, sign_entry
from crdt_store.grants import (
    CODEC,
    INVITE_PREFIX,
    REDEMPTION_PREFIX,
    InviteTerms,
    Mesh,
    Redemption,
)
from crdt_store.roles import INVITABLE, Role
from fabric.core.codec import Codec
from fabric.core.digest import digest
from fabric.core.errors import ConfigError, RemoteProtocolError
from fabric.core.ids import MeshId, PeerId
from fabric.core.signing import Ed25519Signer, Signer

_MARK = "fabric1-"
_CHECK_BYTES = 4
_MAX_TOKEN_CHARS = 4096

Addr = Annotated[str, msgspec.Meta(max_length=300)]
Hash32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """What a token holds.

    Attributes:
        bootstrap: Multiaddrs of members, each ending in ``/p2p/<peer id>``.
        mesh: Name and root public key of the mesh.
        seed: Private seed of K.
    """

    bootstrap: Annotated[tuple[Addr, ...], msgspec.Meta(max_length=8)]
    mesh: Mesh
    seed: Hash32

    @property
    def mesh_id(self) -> MeshId:
        """Id of the mesh one is invited to."""
        return self.mesh.id

    @property
    def key(self) -> PeerId:
        """PeerId of K: the public name of this invite."""
        return Ed25519Signer(self.seed).peer_id

    @override
    def __repr__(self) -> str:
        return f"Invite(mesh={self.mesh.name!r}, key={self.key!r})"


_CODEC: Codec[Invite] = Codec(Invite, max_bytes=_MAX_TOKEN_CHARS)


def make_invite(
    signer: Signer,
    mesh: Mesh,
    bootstrap: Sequence[str],
    *,
    role: Role = Role.WORKER,
    uses: int = 1,
    ttl_seconds: int = 86400,
    now: float,
    hlc: int | None = None,
) -> tuple[str, Entry]:
    """Return a fresh token and the entry that makes it valid.

    Args:
        signer: An owner or admin (or the root).
        mesh: The mesh.
        bootstrap: At most 8 multiaddrs of members.
        role: Neither owner nor admin.
        uses: 1-1000 peers may join with it.
        ttl_seconds: From ``now``.
        now: Wall seconds.
        hlc: Stamp of the entry, when the signer's store gives one.

    Raises:
        ConfigError: a role that cannot be invited, or numbers out of range.
    """
    if role not in INVITABLE:
        names = ", ".join(sorted(INVITABLE))
        raise ConfigError(
            f"an invite cannot carry the role {role}",
            next_step=f"use one of {names}; owners and admins are granted",
        )
    if not 1 <= uses <= 1000 or ttl_seconds <= 0:
        raise ConfigError(f"invite of {uses} uses (1-1000) for {ttl_seconds} s (> 0)")
    one_off = Ed25519Signer.generate()
    terms = InviteTerms(role, uses, int(now) + ttl_seconds)
    entry = sign_entry(
        signer,
        mesh.id,
        INVITE_PREFIX + one_off.peer_id,
        stamp(now) if hlc is None else hlc,
        0,
        CODEC.encode(terms),
    )
    packed = _CODEC.encode(Invite(tuple(bootstrap), mesh, one_off.seed))
    packed += digest(packed)[:_CHECK_BYTES]
    token = _MARK + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    if len(token) > _MAX_TOKEN_CHARS:
        raise ConfigError("bootstrap addresses too long for one token")
    return token, entry


def parse_token_untrusted(token: str) -> Invite:
    """Return what ``token`` holds.

    Raises:
        ConfigError: no token, of another version, or damaged. The message does not
            repeat it.
    """
    token = "".join(token.split())  # pasted from a mail, with line breaks
    if not token.startswith(_MARK):
        raise _bad(f"it does not start with {_MARK!r}")
    if len(token) > _MAX_TOKEN_CHARS:
        raise _bad(f"it has {len(token)} characters, at most {_MAX_TOKEN_CHARS}")
    text = token.removeprefix(_MARK)
    try:
        packed = base64.b64decode(
            text + "=" * (-len(text) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, ValueError):
        raise _bad("it holds characters that do not belong in a token") from None
    body, check = packed[:-_CHECK_BYTES], packed[-_CHECK_BYTES:]
    if digest(body)[:_CHECK_BYTES] != check:
        raise _bad("its checksum does not match; part of it is missing or changed")
    try:
        return _CODEC.decode_untrusted(body)
    except RemoteProtocolError:
        raise _bad("its contents are malformed") from None


def _bad(why: str) -> ConfigError:
    return ConfigError(
        f"not a valid invite token: {why}",
        code="E_BAD_TOKEN",
        next_step="copy the whole token again, or ask for a new one",
    )


def redeem(invite: Invite, joiner: PeerId, now: float) -> Entry:
    """Return the entry with which K admits ``joiner``; show it at admission."""
    one_off = Ed25519Signer(invite.seed)
    key = f"{REDEMPTION_PREFIX}{one_off.peer_id}/{joiner}"
    value = CODEC.encode(Redemption(joiner))
    return sign_entry(one_off, invite.mesh.id, key, stamp(now), 0, value)
