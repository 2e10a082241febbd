"""Turn what the gateway answered into grants and refusals of leases.

An answer must belong to a request that is open: PCP's nonce names the mapping, NAT-PMP
has nothing but the port. Duplicates and answers that came too late change nothing.
"""

from __future__ import annotations

from fabric.core.errors import RemoteProtocolError
from nat.portmap import pcp, pmp
from nat.portmap.config import PortMapConfig
from nat.portmap.keeper import LeaseKeeper
from nat.portmap.lease import Lease
from nat.portmap.outbox import Outbox
from nat.portmap.timing import EpochClock
from nat.portmap.upnp_messages import UpnpAnswer, UpnpConflict, UpnpFailed, UpnpMapped


class AnswerDesk:
    """Answers about leases, from one gateway."""

    def __init__(
        self, config: PortMapConfig, keeper: LeaseKeeper, outbox: Outbox
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._outbox = outbox
        self.reset()

    def reset(self) -> None:
        """Forget the epochs: this is another gateway."""
        self._pcp_clock = EpochClock()
        self._pmp_clock = EpochClock()

    def pcp_lease(self, answer: pcp.MapAnswer) -> Lease:
        """Return the lease that ``answer`` is about.

        Raises:
            RemoteProtocolError: none; somebody guesses, or answers another host.
        """
        lease = self._keeper.leases.get(answer.internal_port)
        if lease is None or answer.nonce != lease.nonce:
            raise RemoteProtocolError("PCP answer to nothing we asked")
        return lease

    def pmp_lease(self, answer: pmp.MapAnswer) -> Lease:
        """Return the lease that ``answer`` is about.

        Raises:
            RemoteProtocolError: none.
        """
        lease = self._keeper.leases.get(answer.internal_port)
        if lease is None or "nat-pmp" not in lease.asked_by:
            raise RemoteProtocolError("NAT-PMP answer to nothing we asked")
        return lease

    def on_pcp(self, answer: pcp.MapAnswer, now: float) -> bool:
        """Apply ``answer``; return whether the server lost its state."""
        lease = self.pcp_lease(answer)
        if self._keeper.method != "pcp" or not lease.pending:
            return False
        if answer.result != pcp.Result.SUCCESS:
            reason = pcp.result_name(answer.result)
            self._keeper.on_refused(lease, reason, answer.lifetime, now)
        else:
            self._keeper.on_granted(
                lease, answer.external_ip, answer.external_port, answer.lifetime, now
            )
        return self._pcp_clock.lost_state(answer.epoch, now)

    def on_pmp(self, answer: pmp.MapAnswer, now: float) -> bool:
        """Apply ``answer``; return whether the server lost its state."""
        lease = self.pmp_lease(answer)
        if self._keeper.method != "nat-pmp" or not lease.pending:
            return False
        if answer.result != pmp.Result.SUCCESS:
            reason = pmp.result_name(answer.result)
            self._keeper.on_refused(lease, reason, 0.0, now)
        else:
            renewed = lease.mapping is not None
            self._keeper.on_granted(
                lease,
                self._keeper.pmp_external_ip,
                answer.external_port,
                answer.lifetime,
                now,
            )
            if renewed and lease is self._keeper.first:
                # the address may have changed, and a mapping does not tell it
                self._outbox.send(pmp.encode_address_request())
        return self._pmp_clock.lost_state(answer.epoch, now)

    def on_upnp(self, answer: UpnpAnswer, now: float) -> None:
        """Apply ``answer``."""
        lease = self._keeper.leases.get(getattr(answer, "internal_port", 0))
        if lease is None or not lease.calling or self._keeper.method != "upnp":
            return
        if isinstance(answer, UpnpMapped):
            # 0 has no end (WANIPConnection:2 section 2.3.16)
            life = answer.lease_seconds or self._config.lease_seconds
            self._keeper.on_granted(
                lease, answer.external_ip, answer.external_port, life, now
            )
        elif isinstance(answer, UpnpConflict):
            self._keeper.on_conflict(lease, now)
        elif isinstance(answer, UpnpFailed):
            self._keeper.on_refused(lease, answer.reason, 0.0, now)
