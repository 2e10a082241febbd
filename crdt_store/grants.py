"""The records of authority, their keys, and how they are signed.

0/grant/<subject>     Grant         by the root, or a delegating member that outranks
0/inv/<K>             InviteTerms   by the root, an owner or an admin
0/rev/<peer>          Revocation    by the root, or a member that outranks
0/root/<new root>     Succession    by the root it follows
inv/<K>/<joiner>      Redemption    by the one-off key K
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from crdt_store.clock import stamp
from crdt_store.entry import Entry, decode_entry_untrusted, sign_entry
from crdt_store.roles import Role
from fabric.core.codec import Codec
from fabric.core.digest import hex_digest
from fabric.core.errors import ConfigError, RemoteProtocolError
from fabric.core.ids import MeshId, PeerId, public_key_of
from fabric.core.signing import Signer

GRANT_PREFIX = "0/grant/"
INVITE_PREFIX = "0/inv/"
REVOCATION_PREFIX = "0/rev/"
ROOT_PREFIX = "0/root/"
REDEMPTION_PREFIX = "inv/"

MAX_NAME_CHARS = 100
MAX_KEPT = 128
"""Entry ids a revocation can list: 16 B each, in a value of 4 KiB."""
KEPT_ID_BYTES = 16

Seconds = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
Prefix = Annotated[str, msgspec.Meta(max_length=200)]
KeptId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Reason = Annotated[str, msgspec.Meta(max_length=200)]


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """The subject has ``role``.

    Attributes:
        prefixes: If not empty, the subject writes only below these (besides the
            role's table).
        not_before: Wall seconds of the first entry it covers.
        not_after: Wall seconds of the last; 0 = no end.
        may_delegate: The subject may grant roles of lower rank.
    """

    role: Role
    prefixes: Annotated[tuple[Prefix, ...], msgspec.Meta(max_length=16)] = ()
    not_before: Seconds = 0
    not_after: Seconds = 0
    may_delegate: bool = False


class InviteTerms(msgspec.Struct, frozen=True, tag="invite"):
    """Whoever holds the one-off key may admit ``uses`` peers until ``expiry``."""

    role: Role
    uses: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    expiry: Seconds


class Redemption(msgspec.Struct, frozen=True, tag="redemption"):
    """K admits ``joiner``, who shows this and proves its PeerId by connecting."""

    joiner: Annotated[PeerId, msgspec.Meta(max_length=64)]


class Revocation(msgspec.Struct, frozen=True, tag="revocation"):
    """The peer (or invite key) is out.

    Attributes:
        cut: Its entries above this stamp are void.
        kept: If given, *only* entries with these id prefixes stay valid, so nothing
            can be back-dated below the cut. None when there were more than MAX_KEPT.
        reason: For people.
        lifted: The author of this slot takes its revocation back.
    """

    cut: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
    reason: Reason = ""
    kept: Annotated[tuple[KeptId, ...], msgspec.Meta(max_length=MAX_KEPT)] | None = None
    lifted: bool = False

    def voids(self, entry: Entry) -> bool:
        """Return whether ``entry`` of the revoked author is void."""
        if self.lifted:
            return False
        if entry.hlc > self.cut:
            return True
        return self.kept is not None and entry.id[:KEPT_ID_BYTES] not in self.kept


class Succession(msgspec.Struct, frozen=True, tag="succession"):
    """The signer, until now the root, gives way to the key this record is about.

    Attributes:
        kept: Id prefixes of what the old root signed and stays valid. Everything else
            it signed or will sign is void, whatever clock it bears: a key that leaks
            later can do nothing. A second succession of the same root is void where
            the first is held.
    """

    kept: Annotated[tuple[KeptId, ...], msgspec.Meta(max_length=MAX_KEPT)]


Record = Grant | InviteTerms | Redemption | Revocation | Succession
CODEC: Codec[Record] = Codec(Record, max_bytes=4096)


@dataclass(frozen=True, slots=True)
class AuthorityRecord:
    """A decoded record with what its key says.

    Attributes:
        entry: The entry that holds it.
        record: Its value.
        subject: Whom it is about: grantee, revoked peer, K, the joiner, or the new
            root.
        invite_key: K of a redemption, else empty.
    """

    entry: Entry
    record: Record
    subject: PeerId
    invite_key: str = ""


def is_authority_key(key: str) -> bool:
    """Return whether ``key`` is in the part that is reconciled first."""
    return key.startswith(("0/", REDEMPTION_PREFIX))


def decode_batch_untrusted(raws: Iterable[bytes]) -> tuple[list[Entry], int]:
    """Return the entries, authority first, and how many did not decode."""
    entries: list[Entry] = []
    malformed = 0
    for raw in raws:
        try:
            entries.append(decode_entry_untrusted(raw))
        except RemoteProtocolError:
            malformed += 1
    entries.sort(key=lambda e: (not is_authority_key(e.key), e.key))
    return entries, malformed


def _about(key: str) -> tuple[type[Record], str, str]:
    for prefix, kind in (
        (GRANT_PREFIX, Grant),
        (INVITE_PREFIX, InviteTerms),
        (REVOCATION_PREFIX, Revocation),
        (ROOT_PREFIX, Succession),
    ):
        if key.startswith(prefix):
            return kind, key.removeprefix(prefix), ""
    invite_key, _, joiner = key.removeprefix(REDEMPTION_PREFIX).partition("/")
    return Redemption, joiner, invite_key


def parse_record_untrusted(entry: Entry) -> AuthorityRecord:
    """Return the record of an entry whose key :func:`is_authority_key`.

    Raises:
        RemoteProtocolError: unknown key, malformed value, or the two do not match.
    """
    record = CODEC.decode_untrusted(entry.value)
    kind, subject, invite_key = _about(entry.key)
    if not isinstance(record, kind):
        raise RemoteProtocolError(f"record at {entry.key!r} is no {kind.__name__}")
    public_key_of(subject)
    if isinstance(record, Redemption):
        public_key_of(invite_key)
        if record.joiner != subject:
            raise RemoteProtocolError("redemption names another joiner than its key")
    return AuthorityRecord(entry, record, PeerId(subject), invite_key)


class Mesh(msgspec.Struct, frozen=True):
    """The name and root key of a mesh: all a peer needs to judge its entries."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    root: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]

    @property
    def id(self) -> MeshId:
        """BLAKE3 of root public key and name, in hex."""
        return MeshId(hex_digest(self.root + self.name.encode()))


def sign_grant(
    signer: Signer, mesh: MeshId, subject: PeerId, grant: Grant, hlc: int
) -> Entry:
    """Return the entry that gives ``subject`` the role in ``grant``."""
    key = GRANT_PREFIX + subject
    return sign_entry(signer, mesh, key, hlc, 0, CODEC.encode(grant))


def sign_succession(
    root: Signer, mesh: MeshId, new_root: PeerId, kept: Iterable[bytes], hlc: int
) -> Entry:
    """Return the entry with which ``root`` gives way to ``new_root``.

    Args:
        root: The present root key.
        mesh: Id of the mesh; it stays.
        new_root: PeerId of the new root key.
        kept: Ids of the entries signed by ``root`` that stay valid, at most MAX_KEPT.
        hlc: Stamp of the entry.

    Raises:
        ConfigError: too many are kept.
    """
    prefixes = tuple(sorted(entry_id[:KEPT_ID_BYTES] for entry_id in kept))
    if len(prefixes) > MAX_KEPT:
        raise ConfigError(
            f"the root signed {len(prefixes)} entries, more than {MAX_KEPT}",
            next_step="revoke grants nobody needs any more, then rotate",
        )
    value = CODEC.encode(Succession(prefixes))
    return sign_entry(root, mesh, ROOT_PREFIX + new_root, hlc, 0, value)


def founded_untrusted(name: str, root: bytes, grant: bytes, owner: PeerId) -> Mesh:
    """Return the mesh in which ``grant`` makes ``owner`` the first owner.

    Raises:
        ConfigError: the name or key is out of bounds, or the grant says otherwise.
    """
    if not 1 <= len(name) <= MAX_NAME_CHARS or len(root) != 32:
        raise ConfigError(f"a mesh name has 1-{MAX_NAME_CHARS} characters")
    mesh = Mesh(name, root)
    try:
        entry = decode_entry_untrusted(grant)
        record = parse_record_untrusted(entry)
    except RemoteProtocolError as exc:
        raise ConfigError(f"the grant of the first owner: {exc.reason}") from exc
    founds = (
        entry.mesh == mesh.id
        and entry.author == root
        and record.subject == owner
        and isinstance(record.record, Grant)
        and record.record.role is Role.OWNER
        and entry.signature_matches()
    )
    if not founds:
        raise ConfigError("the root does not make this peer an owner of this mesh")
    return mesh


def create_mesh(
    name: str, root: Signer, owner: PeerId, now: float
) -> tuple[Mesh, Entry]:
    """Return a new mesh and the root-signed entry that makes ``owner`` its owner.

    Args:
        name: 1-100 characters.
        root: Root key; needed again only to grant or revoke owners.
        owner: First member.
        now: Wall seconds.
    """
    mesh = Mesh(name, root.public_key)
    grant = Grant(Role.OWNER, may_delegate=True)
    return mesh, sign_grant(root, mesh.id, owner, grant, stamp(now))
