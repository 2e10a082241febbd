"""Ask for every wanted port by the method that works, and keep what is granted.

A mapping is asked for again at half its life or every ``refresh_seconds``, whichever
is sooner. A renewal that is not answered is repeated until the mapping's life is over;
then it is lost. When nothing is held and nothing is awaited the method has failed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nat.portmap import pcp, pmp
from nat.portmap.api import Lost, Mapped, Mapping, is_assignable
from nat.portmap.config import Method, PortMapConfig
from nat.portmap.gateway import Gateway
from nat.portmap.lease import (
    MAX_LEASE_SECONDS,
    MIN_LEASE_SECONDS,
    Lease,
    WantedPort,
)
from nat.portmap.outbox import Outbox
from nat.portmap.timing import PCP_FIRST_SECONDS, PMP_FIRST_SECONDS, Retransmission
from nat.portmap.upnp_messages import UpnpMap

MAX_CONFLICTS = 8
"""External ports tried for one port before the method counts as refused."""
MIN_RETRY_SECONDS = 30.0
MAX_RETRY_SECONDS = 1800.0
"""Bounds of the pause after a refusal, whatever the router says about it."""


class LeaseKeeper:
    """The leases of one gateway.

    Attributes:
        gateway: Whom we ask, once known.
        method: By which protocol, once chosen.
        upnp_url: Description of the gateway, if it speaks UPnP.
        pmp_external_ip: The address NAT-PMP told; its mappings do not.
    """

    def __init__(
        self,
        config: PortMapConfig,
        ports: Sequence[WantedPort],
        outbox: Outbox,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._outbox = outbox
        self._rng = rng
        self.leases = {port.internal_port: Lease(port, rng) for port in ports}
        self.gateway: Gateway | None = None
        self.method: Method | None = None
        self.upnp_url = ""
        self.pmp_external_ip = ""

    @property
    def first(self) -> Lease:
        """The lease that probes for PCP."""
        return next(iter(self.leases.values()))

    @property
    def failed(self) -> bool:
        """Whether the method granted nothing and nothing is awaited."""
        return not any(
            lease.mapping is not None or lease.pending for lease in self.leases.values()
        )

    @property
    def refusal(self) -> str:
        """Why a port is not mapped, or ""."""
        refusals = [lease.refusal for lease in self.leases.values() if lease.refusal]
        return refusals[0] if refusals else ""

    def mappings(self) -> tuple[Mapping, ...]:
        """Return what is held."""
        held = (lease.mapping for lease in self.leases.values())
        return tuple(mapping for mapping in held if mapping is not None)

    def move(self, gateway: Gateway | None, reason: str) -> None:
        """Forget the old gateway's mappings; ``gateway`` is another one."""
        self.lose_all(reason)
        for lease in self.leases.values():
            lease.reset()
        self.gateway, self.method = gateway, None
        self.upnp_url = self.pmp_external_ip = ""

    def lose_all(self, reason: str) -> None:
        """Say that every mapping is gone."""
        for lease in self.leases.values():
            lease.settle()
            self._lose(lease, reason)

    def start(self, method: Method, now: float) -> None:
        """Map every port by ``method``."""
        self.method = method
        for lease in self.leases.values():
            lease.refusal = ""
            self.ask(lease, now)

    def refresh(self, now: float, *, verify: bool = False) -> None:
        """Ask for everything again: the gateway may have forgotten it.

        Args:
            now: The time.
            verify: Also count a mapping as lost that is not confirmed in time; another
                router may have the old one's address.
        """
        for lease in self.leases.values():
            self.ask(lease, now)
            if verify:
                lease.verifying = True
                lease.give_up_at = now + self._patience()

    def ask(self, lease: Lease, now: float) -> None:
        """Send the request for ``lease``."""
        if lease.calling:  # its answer tells as much as another call's
            return
        assert self.method is not None, "no method is chosen"
        first_try = lease.mapping is None
        port = lease.asking(self.method)
        if self.method == "upnp":
            lease.calling = True
            self._call(lease, port)
        else:
            pause = PCP_FIRST_SECONDS if self.method == "pcp" else PMP_FIRST_SECONDS
            lease.resend = Retransmission(pause, now, self._rng)
            self._outbox.send(self.encode(lease, self.method, lifetime=None))
        if first_try or self.method == "upnp":
            lease.give_up_at = now + self._patience()

    def encode(self, lease: Lease, method: Method, *, lifetime: int | None) -> bytes:
        """Return the request for ``lease``; 0 removes, None is the configured life."""
        life = self._config.lease_seconds if lifetime is None else lifetime
        port = lease.asked_port if life else 0
        if method == "nat-pmp":
            return pmp.encode_map(lease.internal_port, port, life)
        assert self.gateway is not None, "no gateway to ask"
        held = lease.mapping.external_ip if lease.mapping and life else ""
        same_family = (":" in held) == (":" in self.gateway.source)
        return pcp.encode_map(
            pcp.MapRequest(
                client=self.gateway.source,
                nonce=lease.nonce,
                internal_port=lease.internal_port,
                external_port=port,
                external_ip=held if same_family else "",
                lifetime=life,
            )
        )

    def on_granted(
        self, lease: Lease, external_ip: str, external_port: int, life: int, now: float
    ) -> None:
        """Hold what the router granted, unless it makes no sense."""
        assert self.method is not None, "no method is chosen"
        life = min(life, MAX_LEASE_SECONDS)
        if life < MIN_LEASE_SECONDS:
            self.on_refused(lease, f"a lease of {life} s is too short", 0.0, now)
            return
        if not external_port or not is_assignable(external_ip):
            facts = f"external address {external_ip or '(none)'}:{external_port}"
            self.on_refused(lease, f"the router names the {facts}", 0.0, now)
            return
        mapping = Mapping(
            internal_port=lease.internal_port,
            external_ip=external_ip,
            external_port=external_port,
            method=self.method,
            lease_seconds=life,
        )
        before = lease.mapping
        if before is not None and not _same_place(before, mapping):
            self._lose(lease, f"the router moved it to {external_ip}:{external_port}")
        fresh = lease.mapping is None
        lease.grant(mapping, self._config, now)
        if fresh:
            self._outbox.emit(Mapped(mapping))

    def on_refused(
        self, lease: Lease, reason: str, retry_after: float, now: float
    ) -> None:
        """Note a refusal and when to ask again; what is held stays until it expires."""
        if lease.verifying:
            self._lose(lease, reason)
        lease.settle()
        lease.refusal = reason
        pause = min(max(retry_after, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
        lease.renew_at = now + pause

    def on_conflict(self, lease: Lease, now: float) -> None:
        """Ask for another external port, a bounded number of times."""
        lease.settle()
        self._lose(lease, "the router gave its port to another host")
        lease.take_other_port()
        if lease.conflicts > MAX_CONFLICTS:  # one more at each retry from now on
            reason = f"{lease.conflicts} external ports are taken"
            self.on_refused(lease, reason, 0.0, now)
        else:
            self.ask(lease, now)

    def on_external_ip(self, external_ip: str, now: float) -> None:
        """Note what NAT-PMP says; mappings at another address are moved there."""
        self.pmp_external_ip = external_ip
        for lease in self.leases.values():
            held = lease.mapping
            if held is None or held.method != "nat-pmp":
                continue
            if held.external_ip != external_ip:
                life = max(int(lease.expires_at - now), MIN_LEASE_SECONDS)
                self.on_granted(lease, external_ip, held.external_port, life, now)

    def on_timeout(self, now: float) -> None:
        """Expire, give up, repeat and renew what is due."""
        for lease in self.leases.values():
            if now >= lease.expires_at:
                self._lose(lease, "the router did not renew it")
                lease.refusal = "the router stopped answering"
                if lease.pending:
                    lease.give_up_at = now + self._patience()
            if now >= lease.give_up_at:
                self.on_refused(lease, "the router does not answer", 0.0, now)
            elif now >= lease.renew_at:
                self.ask(lease, now)
            elif lease.resend is not None and now >= lease.resend.at:
                lease.resend.sent(now)
                assert self.method is not None, "no method is chosen"
                self._outbox.send(self.encode(lease, self.method, lifetime=None))

    def next_timeout(self) -> float:
        """Return when :meth:`on_timeout` has work."""
        return min(lease.next_timeout() for lease in self.leases.values())

    def _call(self, lease: Lease, external_port: int) -> None:
        assert self.gateway is not None, "no gateway to ask"
        self._outbox.call(
            UpnpMap(
                gateway=self.gateway.address,
                source=self.gateway.source,
                url=self.upnp_url,
                internal_port=lease.internal_port,
                external_port=external_port,
                lease_seconds=self._config.lease_seconds,
            )
        )

    def _lose(self, lease: Lease, reason: str) -> None:
        held = lease.drop()
        if held is not None:
            self._outbox.emit(Lost(held, reason))

    def _patience(self) -> float:
        """Return how long an answer may take; UPnP calls wait for each other."""
        if self.method == "upnp":
            return self._config.upnp_seconds * (len(self.leases) + 1)
        return self._config.search_seconds


def _same_place(one: Mapping, other: Mapping) -> bool:
    place = (one.external_ip, one.external_port, one.method)
    return place == (other.external_ip, other.external_port, other.method)
