"""Authority at the present moment: what the Gate and the command line ask."""

from __future__ import annotations

from collections.abc import Callable

from crdt_store.authority import Authority
from crdt_store.roles import Role
from fabric.core.ids import PeerId
from fabric.net.ports import Decision


class Membership:
    """Answers from memory, without waiting.

    Args:
        authority: The records held.
        clock: Wall seconds.
    """

    def __init__(self, authority: Authority, clock: Callable[[], float]) -> None:
        self._authority = authority
        self._clock = clock

    def role_of(self, peer: PeerId) -> Role | None:
        """Return the highest role of ``peer``, or None when it is no member."""
        return self._authority.role_of(peer, self._clock())

    def membership(self, peer: PeerId) -> Decision:
        """Return whether ``peer`` is a member.

        Codes: E_NOT_MEMBER, E_REVOKED, E_INVITE_EXHAUSTED, E_INVITE_EXPIRED.
        """
        return self._authority.membership(peer, self._clock())

    def members(self) -> frozenset[PeerId]:
        """Return every member."""
        return self._authority.members(self._clock())

    def revocation(self, peer: PeerId) -> str | None:
        """Return why ``peer`` was revoked, or None when it was not."""
        decision = self.membership(peer)
        return decision.reason if decision.code == "E_REVOKED" else None
