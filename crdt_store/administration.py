"""What owners and admins do: invite, grant, revoke. Each is one entry of theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crdt_store.authority import Authority
from crdt_store.grants import (
    CODEC,
    GRANT_PREFIX,
    KEPT_ID_BYTES,
    MAX_KEPT,
    REVOCATION_PREFIX,
    Grant,
    Mesh,
    Revocation,
)
from crdt_store.invites import make_invite
from crdt_store.roles import Role
from crdt_store.slots import Slots
from crdt_store.trust import trust_rows
from crdt_store.trust_row import TrustRow
from crdt_store.views import DAY_SECONDS, Put
from fabric.core.ids import PeerId, public_key_of
from fabric.core.signing import Signer


class Administration:
    """Writes authority entries signed by this peer.

    Every method returns after the commit and raises RemoteRefused when this peer's
    role does not allow it.
    """

    def __init__(
        self,
        mesh: Mesh,
        slots: Slots,
        authority: Authority,
        signer: Signer,
        put: Put,
        clock: Callable[[], float],
    ) -> None:
        self._mesh = mesh
        self._slots = slots
        self._authority = authority
        self._signer = signer
        self._put = put
        self._clock = clock

    async def invite(
        self,
        bootstrap: Sequence[str],
        *,
        role: Role = Role.WORKER,
        uses: int = 1,
        ttl_seconds: int = DAY_SECONDS,
    ) -> str:
        """Return a new token (see :func:`make_invite`).

        Raises:
            ConfigError: terms out of range.
        """
        token, entry = make_invite(
            self._signer,
            self._mesh,
            bootstrap,
            role=role,
            uses=uses,
            ttl_seconds=ttl_seconds,
            now=self._clock(),
        )
        await self._put(entry.key, entry.value, 0)
        return token

    async def grant(self, subject: PeerId, grant: Grant) -> None:
        """Give ``subject`` a role below ours."""
        public_key_of(subject)
        await self._put(GRANT_PREFIX + subject, CODEC.encode(grant), 0)

    async def revoke(self, peer: PeerId, reason: str) -> None:
        """Void the membership of ``peer`` (or of an invite key) and its later entries.

        What we hold of it stays valid. Up to MAX_KEPT entries are listed, and then
        nothing else it wrote or will write is valid, whatever clock it bears; with
        more, entries dated before the newest we hold still are.
        """
        held = self._slots.authored(public_key_of(peer))
        ids = tuple(sorted(entry.id[:KEPT_ID_BYTES] for entry in held))
        cut = max((entry.hlc for entry in held), default=0)
        kept = ids if len(ids) <= MAX_KEPT else None
        record = Revocation(cut, reason[:200], kept)
        await self._put(REVOCATION_PREFIX + peer, CODEC.encode(record), 0)

    async def lift_revocation(self, peer: PeerId) -> None:
        """Take back our revocation of ``peer``."""
        record = Revocation(0, lifted=True)
        await self._put(REVOCATION_PREFIX + peer, CODEC.encode(record), 0)

    def rows(self) -> list[TrustRow]:
        """Return who is a member and which invites there are."""
        return trust_rows(self._slots, self._authority, self._clock())

    @property
    def root(self) -> PeerId:
        """The present root key."""
        return self._authority.root

    def root_signed(self) -> list[bytes]:
        """Return the ids of the entries that the present root signed."""
        return [entry.id for entry in self._slots.authored(public_key_of(self.root))]
