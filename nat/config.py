"""The settings of traversal: each area owns its part."""

from __future__ import annotations

import msgspec

from nat.discovery.config import DiscoveryConfig
from nat.portmap.config import PortMapConfig
from nat.probe.config import ProbeConfig
from nat.punch.config import PunchConfig
from nat.reachability.config import ReachabilityConfig
from nat.relay.config import CircuitConfig, RelayConfig


class NatConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this peer reaches others, and is reached."""

    reachability: ReachabilityConfig = ReachabilityConfig()
    mapping: PortMapConfig = PortMapConfig()
    punch: PunchConfig = PunchConfig()
    relay: RelayConfig = RelayConfig()
    circuit: CircuitConfig = CircuitConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    probe: ProbeConfig = ProbeConfig()
