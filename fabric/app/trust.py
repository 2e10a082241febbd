"""What the trust verbs do: grant, revoke, take in what the root signed."""

from __future__ import annotations

from crdt_store.grants import Grant
from crdt_store.roles import Role
from fabric.app import control_messages as m
from fabric.app.session import Session
from fabric.core.errors import ConfigError, FabricError, RemoteRefused
from fabric.core.ids import PeerId


async def change_trust(
    session: Session, request: m.Grant | m.Revoke | m.AddAuthority
) -> None:
    """Carry out ``request``; it is on disk and spreads when this returns.

    Raises:
        ConfigError: no such role or peer.
        RemoteRefused: this peer's role, or the entry's signer, does not allow it.
    """
    match request:
        case m.Grant(peer, role):
            wanted = _role(role)
            grant = Grant(wanted, may_delegate=wanted in (Role.OWNER, Role.ADMIN))
            await session.store.admin.grant(session.resolve(peer), grant)
        case m.Revoke(peer, reason, lift):
            await _revoke(session, _subject(session, peer), reason, lift=lift)
        case m.AddAuthority(entry):
            if not session.store.ingest_authority_untrusted([entry]):
                raise RemoteRefused(
                    "the mesh does not accept this entry: it was not signed by the "
                    "present root, or is known already",
                    code="E_NOT_AUTHORISED",
                    next_step="use the root key file of the last rotation",
                )


async def _revoke(session: Session, peer: PeerId, reason: str, *, lift: bool) -> None:
    if peer == session.own and not lift:
        raise ConfigError("a peer does not revoke itself", next_step="`fabric leave`")
    admin = session.store.admin
    await (admin.lift_revocation(peer) if lift else admin.revoke(peer, reason))


def _subject(session: Session, text: str) -> PeerId:
    """Return the peer or invite key that ``text`` names."""
    try:
        return session.resolve(text)
    except FabricError:
        rows = session.store.admin.rows()
        found = {row.subject for row in rows if row.subject.endswith(text)}
        if len(found) != 1:
            raise
        return found.pop()


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        known = ", ".join(Role)
        raise ConfigError(f"no role {text!r}", next_step=f"roles: {known}") from None
