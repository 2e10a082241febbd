"""The node's gate: the mesh's own decision, and partitions that tests ask for."""

from __future__ import annotations

from collections.abc import Sequence

from attestation.admission import E_NOT_ATTESTED
from attestation.gate import E_QUARANTINED, MembershipGate
from attestation.ports import Verdict
from crdt_store.service import Store
from fabric.core.ids import PeerId
from fabric.net.ports import ALLOWED, PROTOCOL_RPC, Decision
from nat.relay.circuit_addresses import via
from nat.vantage import Vantage

_NOT_OPEN = Decision(
    allowed=False,
    code="E_STARTING",
    reason="this peer has not read its state yet",
    next_step="try again in a few seconds",
)


class LateAuthority:
    """What the gate asks of the store, which is opened after the network it uses.

    Attributes:
        store: Set once it is open; until then nobody is a member.
    """

    def __init__(self) -> None:
        self.store: Store | None = None

    def membership(self, peer: PeerId) -> Decision:
        """Return whether ``peer`` is a member."""
        if self.store is None:
            return _NOT_OPEN
        return self.store.authority.membership(peer)

    def record(self, verdict: Verdict) -> None:
        """Keep a verdict."""
        if self.store is not None:
            self.store.verdicts.record(verdict)

    def revocation(self, peer: PeerId) -> str | None:
        """Return why ``peer`` was revoked, or None."""
        return None if self.store is None else self.store.verdicts.revocation(peer)


class LateRank:
    """Which of a peer's addresses to dial, asked of traversal, which is opened last.

    Attributes:
        vantage: Set once it is open; until then all are as good.
    """

    def __init__(self) -> None:
        self.vantage: Vantage | None = None

    def __call__(self, peer: PeerId, addrs: Sequence[str]) -> Sequence[str]:
        """Return the addresses worth a dial, best first, members in between last.

        All of them if none seems good: a wrong guess about another site's addresses
        must not make a peer unreachable.
        """
        if self.vantage is None:
            return addrs
        good = self.vantage.rank(peer, addrs) or tuple(addrs)
        return (*good, *(via(other, peer) for other in self.vantage.neighbours(peer)))


class SessionGate:
    """A Gate that first refuses the peers of other groups of a partition."""

    def __init__(self, inner: MembershipGate) -> None:
        self._inner = inner
        self._cut: frozenset[PeerId] = frozenset()

    @property
    def cut(self) -> frozenset[PeerId]:
        """Peers we are cut off from."""
        return self._cut

    def partition(self, peers: frozenset[PeerId]) -> None:
        """Refuse all contact with ``peers``; empty heals."""
        self._cut = peers

    def allows(self, peer: PeerId, protocol: str) -> Decision:
        """Return whether ``peer`` may open ``protocol``."""
        if peer in self._cut:
            return Decision(
                allowed=False,
                code="E_PARTITIONED",
                reason="this peer is cut off by a simulated partition",
                next_step="`fabric sim heal` ends it",
            )
        return self._inner.allows(peer, protocol)

    def may_meet(self, peer: PeerId) -> Decision:
        """Return whether to dial ``peer``: allowed, or lacking but fresh evidence."""
        decision = self.allows(peer, PROTOCOL_RPC)
        lacking = decision.code in (E_NOT_ATTESTED, E_QUARANTINED)
        return ALLOWED if lacking else decision

    def changes(self) -> list[tuple[PeerId, Decision]]:
        """Return the peers whose live connections must be closed now."""
        return self._inner.changes()
