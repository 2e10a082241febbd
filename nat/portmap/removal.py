"""Take the mappings back before leaving, and know when that is done.

Every method that was ever asked on this network may have granted something, even when
its answer was lost or came after another method was chosen; so each is told. The answer
of the method in use is waited for, the others get one datagram.
"""

from __future__ import annotations

import random
from math import inf

from nat.portmap.config import Method
from nat.portmap.keeper import LeaseKeeper
from nat.portmap.lease import Lease
from nat.portmap.outbox import Outbox
from nat.portmap.timing import PMP_FIRST_SECONDS, Retransmission
from nat.portmap.upnp_messages import UpnpUnmap


class Removal:
    """The removal of all mappings of one gateway.

    Args:
        keeper: Its leases; nothing else asks for them any more.
        outbox: Where the requests go.
        deadline: When to leave without answers: leases end by themselves.
        now: The time.
        rng: Spreads the repeats.
    """

    def __init__(
        self,
        keeper: LeaseKeeper,
        outbox: Outbox,
        deadline: float,
        now: float,
        rng: random.Random,
    ) -> None:
        self._keeper = keeper
        self._outbox = outbox
        self._deadline = deadline
        # PCP's own first pause would be as long as the whole removal may take
        self._datagrams: dict[int, Retransmission] = {}
        self._calls: set[int] = set()
        self._expired = False
        for lease in keeper.leases.values():
            for method in sorted(lease.asked_by):
                self._remove(lease, method)
                if method == keeper.method and method != "upnp":
                    self._datagrams[lease.internal_port] = Retransmission(
                        PMP_FIRST_SECONDS, now, rng
                    )

    @property
    def done(self) -> bool:
        """Whether everything is answered, or it is time to leave."""
        return self._expired or not (self._datagrams or self._calls)

    def on_datagram(self, method: Method, internal_port: int) -> None:
        """Note an answer by ``method``; a refusal means it was not there."""
        if method == self._keeper.method:
            self._datagrams.pop(internal_port, None)

    def on_call(self, internal_port: int) -> None:
        """Note the answer of a UPnP call, whatever it is."""
        self._calls.discard(internal_port)

    def on_timeout(self, now: float) -> None:
        """Repeat what is due, or give up."""
        self._expired = self._expired or now >= self._deadline
        method = self._keeper.method
        for port, resend in self._datagrams.items():
            if now >= resend.at and method is not None and not self._expired:
                resend.sent(now)
                self._remove(self._keeper.leases[port], method)

    def next_timeout(self) -> float:
        """Return when :meth:`on_timeout` has work."""
        if self.done:
            return inf
        return min([self._deadline, *(r.at for r in self._datagrams.values())])

    def _remove(self, lease: Lease, method: Method) -> None:
        keeper = self._keeper
        if method != "upnp":
            self._outbox.send(keeper.encode(lease, method, lifetime=0))
        elif keeper.gateway is not None:
            self._calls.add(lease.internal_port)
            self._outbox.call(
                UpnpUnmap(
                    gateway=keeper.gateway.address,
                    source=keeper.gateway.source,
                    url=keeper.upnp_url,
                    internal_port=lease.internal_port,
                    external_port=lease.asked_port,
                )
            )
