"""Keep ports of this peer mapped at its router while a block runs.

What the router says is not believed further than it must be: answers count only from
the gateway's address, to an open request, within bounds; and an external address is
only a *candidate*. Whether strangers reach it is found out by a dial-back
(reachability), never from the router's word.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from fabric.core.telemetry import DROPPED, Counters
from fabric.net.tasks import collapse_group
from nat.portmap import explain
from nat.portmap.api import (
    Event,
    Explained,
    Finding,
    Lost,
    Mapped,
    Mapping,
    is_global,
)
from nat.portmap.config import PortMapConfig
from nat.portmap.gateway import Gateway, GatewayLookup, default_gateways
from nat.portmap.lease import WantedPort
from nat.portmap.link_service import PortMapLink

EVENTS = 64
"""Room for events: some per port and network change; ``mappings()`` is the truth."""
_EXTRA_SECONDS = 0.5
_log = logging.getLogger(__name__)


class PortMapping:
    """The mappings of this peer, one link for each address family.

    Args:
        config: Methods and times.
        ports: What to map.
        find_gateways: Says where the routers are.
        counters: Counts stray answers and dropped events.
    """

    def __init__(
        self,
        config: PortMapConfig,
        ports: Sequence[WantedPort],
        find_gateways: Callable[[], GatewayLookup],
        counters: Counters,
    ) -> None:
        self._find_gateways = find_gateways
        self._counters = counters
        self._send, self._receive = trio.open_memory_channel[Event](EVENTS)
        self._has_ipv6 = False
        self._ipv4 = PortMapLink(config, ports, self._publish, counters)
        self._ipv6 = PortMapLink(config, ports, self._publish_ipv6, counters)
        self.enabled = config.enabled

    def mappings(self) -> tuple[Mapping, ...]:
        """Return what the routers say they forward to us now."""
        return self._ipv4.mapper.mappings() + self._ipv6.mapper.mappings()

    def events(self) -> trio.MemoryReceiveChannel[Event]:
        """Return the one channel of events; the newest are dropped when it is full."""
        return self._receive

    def report(self) -> tuple[Finding, ...]:
        """Return why things are as they are: IPv4 first, IPv6 if there is a router."""
        if not self.enabled:
            return (explain.off(),)
        findings = (self._ipv4.mapper.finding(),)
        return (*findings, self._ipv6.mapper.finding()) if self._has_ipv6 else findings

    def on_network_change(self) -> None:
        """Look for the gateways again; an address, a route or an uplink changed."""
        if not self.enabled:
            return
        found = self._find_gateways()
        self._ipv4.use(found.ipv4, found.reason)
        pinhole = _worth_a_pinhole(found.ipv6)
        self._has_ipv6 = pinhole is not None
        self._ipv6.use(pinhole, "no IPv6 router, or no global address")

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ipv4.run)
            nursery.start_soon(self._ipv6.run)

    def _close(self) -> None:
        self._ipv4.close()
        self._ipv6.close()

    def _publish_ipv6(self, event: Event) -> None:
        # that there is no IPv6 router is normal, and no news
        if self._has_ipv6 or not isinstance(event, Explained):
            self._publish(event)

    def _publish(self, event: Event) -> None:
        _note(event)
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._counters.add(DROPPED, label="portmap_events")
        except trio.BrokenResourceError:
            pass  # nobody listens any more


@asynccontextmanager
async def open_port_mapping(
    config: PortMapConfig,
    ports: Sequence[WantedPort],
    *,
    find_gateways: Callable[[], GatewayLookup] = default_gateways,
    counters: Counters | None = None,
) -> AsyncIterator[PortMapping]:
    """Have ``ports`` mapped while the block runs; entering does not wait for a router.

    At exit, also by cancellation, the mappings are removed within
    ``config.close_seconds``; what the router did not confirm by then ends with its
    lease.
    """
    service = PortMapping(config, ports, find_gateways, counters or Counters())
    if not config.enabled:
        yield service
        return
    # Shielded, so that the tasks outlive a cancelled body until they have removed.
    shielded = trio.CancelScope(shield=True)

    async def run() -> None:
        with shielded:
            await service._run()

    with collapse_group():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            service.on_network_change()
            try:
                yield service
            finally:
                service._close()
                shielded.deadline = (
                    trio.current_time() + config.close_seconds + _EXTRA_SECONDS
                )


def _worth_a_pinhole(gateway: Gateway | None) -> Gateway | None:
    """Return ``gateway`` if strangers could use our address beyond it."""
    return gateway if gateway is not None and is_global(gateway.source) else None


def _note(event: Event) -> None:
    if isinstance(event, Mapped | Lost):
        m = event.mapping
        _log.info(
            "portmap.%s port=%d external=%s:%d method=%s",
            "mapped" if isinstance(event, Mapped) else "lost",
            m.internal_port,
            m.external_ip,
            m.external_port,
            m.method,
        )
    elif isinstance(event, Explained):
        _log.info("portmap.%s %s", event.finding.code, event.finding.reason)
