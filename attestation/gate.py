"""The one answer to "may this peer open this?": membership and a current standing.

Default deny. Pure: membership, revocations and standings are asked in memory, time
comes from the clock that was passed in.
"""

from __future__ import annotations

from collections.abc import Callable

from attestation.admission import E_NOT_ATTESTED, refusal_of
from attestation.ports import Membership, VerdictStore
from attestation.standings import Standings
from attestation.states import State
from fabric.core.ids import PeerId
from fabric.net.ports import ALLOWED, PROTOCOL_ATTEST, Decision

E_REVOKED = "E_REVOKED"
E_QUARANTINED = "E_QUARANTINED"

OPEN_PROTOCOLS = frozenset(
    {
        PROTOCOL_ATTEST,
        "/ipfs/id/1.0.0",
        "/ipfs/ping/1.0.0",
        "/libp2p/circuit/relay/0.2.0/hop",
        "/libp2p/circuit/relay/0.2.0/stop",
        "/libp2p/autonat/1.0.0",
        "/libp2p/autonat/2/dial-request",
        "/libp2p/autonat/2/dial-back",
        "/rendezvous/1.0.0",
    }
)
"""Open to everyone: what a peer needs to become admitted from behind a NAT.

Each of these bounds what a stranger gets. A relay gives strangers a small budget of
their own, and what comes out of a circuit meets this gate again at its end.
"""


class MembershipGate:
    """A :class:`fabric.net.ports.Gate` over grants, revocations and standings.

    Args:
        membership: Whether the grants make a peer a member.
        verdicts: Tells revoked peers.
        standings: Where peers stand with us.
        clock: Monotonic seconds.
        own: Our identity, always allowed.
        allow_suspect: Whether a peer that missed one interval keeps its connections.
    """

    def __init__(
        self,
        membership: Membership,
        verdicts: VerdictStore,
        standings: Standings,
        clock: Callable[[], float],
        *,
        own: PeerId,
        allow_suspect: bool = True,
    ) -> None:
        self._membership = membership
        self._verdicts = verdicts
        self._standings = standings
        self._clock = clock
        self._own = own
        self._admitting = {State.TRUSTED} | (
            {State.SUSPECT} if allow_suspect else set()
        )
        # only members enter, so the mesh bounds it
        self._allowed: set[PeerId] = set()

    def allows(self, peer: PeerId, protocol: str) -> Decision:
        """Return whether ``peer`` may open ``protocol``."""
        if protocol in OPEN_PROTOCOLS or peer == self._own:
            return ALLOWED
        decision = self._decide(peer)
        if decision.allowed:
            self._allowed.add(peer)
        return decision

    def changes(self) -> list[tuple[PeerId, Decision]]:
        """Return the peers that were allowed and no longer are, each once.

        Call it after grants, verdicts or standings changed and every few seconds (time
        alone ends a standing), and close those peers' live connections.
        """
        decided = [(peer, self._decide(peer)) for peer in sorted(self._allowed)]
        denied = [(peer, d) for peer, d in decided if not d.allowed]
        self._allowed.difference_update(peer for peer, _ in denied)
        return denied

    def _decide(self, peer: PeerId) -> Decision:
        revoked = self._verdicts.revocation(peer)
        if revoked is not None:
            return Decision(
                allowed=False,
                code=E_REVOKED,
                reason=f"revoked: {revoked}",
                next_step="ask an admin to enrol this peer again",
            )
        member = self._membership(peer)
        if not member.allowed:
            full = refusal_of(member)
            return Decision(
                allowed=False,
                code=full.code,
                reason=full.reason,
                next_step=full.next_step,
            )
        standing = self._standings.of(peer, self._clock())
        if standing.state in self._admitting:
            return ALLOWED
        quarantined = standing.state is State.QUARANTINED
        return Decision(
            allowed=False,
            code=E_QUARANTINED if quarantined else E_NOT_ATTESTED,
            reason=f"{standing.state.value}: {standing.reason}",
            next_step="it attests again by itself; see `fabric why` on both peers",
        )
